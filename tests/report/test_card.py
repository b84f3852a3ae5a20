"""The card says all there is to say, and what it quotes stays a quotation."""

import hashlib
import re

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import coremerge
from coremerge.adapter import Adapter, Info, Module
from coremerge.lowrank import LowRank
from coremerge.recipe import Recipe, read_recipe
from coremerge.report.card import (
    CardAdapter,
    CardInput,
    clean,
    code,
    describe,
    escape,
    fence,
    max_lora_rank,
    model_card,
)

NASTY = "\x1b[31m<script>alert(1)</script> `x` [a](javascript:b) | ![i](http://e.vil) \u202e\n# head\n---\n```\nend"


def card(**values):
    return model_card(
        CardInput(**{"inputs": [CardAdapter("a", "org/a", "f" * 40, ranks=[8, 16], sha256="0" * 64)], **values})
    )


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


class TestContents:
    def test_front_matter(self):
        assert front(card(base_model="org/base", license="mit")) == {
            "base_model": "org/base",
            "base_model_relation": "adapter",
            "license": "mit",
            "library_name": "peft",
            "tags": ["lora", "coremerge", "merge"],
        }
        merged = front(card(base_model="org/base", relation="merge"))
        assert merged["base_model_relation"] == "merge"
        assert merged["library_name"] == "transformers"

    @pytest.mark.parametrize("base", [None, "/home/me/base", "base", "a/b/c", "org/base\nlicense: mit", NASTY])
    def test_a_base_that_is_no_hub_id_stays_out_of_it(self, base):
        assert front(card(base_model=base)).keys() == {"library_name", "tags"}

    def test_everything_is_there(self):
        text = card(
            base_model="org/base",
            base_revision="1234abcd",
            recipe="merge_method: tsv\n",
            command=["coremerge", "merge", "A B", "-o", "out"],
            modules=24,
            rank=48,
            scale=0.45,
            energy_lost=0.0123,
            dtype="bfloat16",
            notes=["a was read from a pickle"],
            version="0.1.0",
            task_type="CAUSAL_LM",
        )
        for said in (
            "`org/base`", "`1234abcd`", "```yaml\nmerge_method: tsv\n```", "coremerge merge 'A B' -o out",
            "| modules | 24 |",
            "| rank | 48 |", "| overall scale | 0.45 |", "1.23 %", "`bfloat16`", "- a was read from a pickle",
            "| coremerge | 0.1.0 |", "| `a` | `org/a` | `" + "f" * 40 + "` | LORA | 8, 16 | `" + "0" * 64 + "` |",
            'AutoModelForCausalLM.from_pretrained("org/base", revision="1234abcd")', "--max-lora-rank 64",
        ):  # fmt: skip
            assert said in text

    def test_nothing_dropped_is_said_too(self):
        assert "Nothing: every module" in card()

    @pytest.mark.parametrize(
        ("task", "name"), [("SEQ_CLS", "AutoModelForSequenceClassification"), ("FEATURE_EXTRACTION", "AutoModel")]
    )
    def test_no_vllm_for_encoders(self, task, name):
        text = card(task_type=task, rank=8)
        assert f"import {name}\n" in text
        assert "vllm" not in text

    def test_a_whole_model(self):
        text = card(relation="merge", task_type="CAUSAL_LM", base_model="org/base")
        assert "PeftModel" not in text
        assert "vllm serve path/to/this/folder" in text
        assert "vllm" not in card(relation="merge")

    def test_what_vllm_does_not_serve(self):
        assert "up to 512, and this one is 513" in card(rank=513)
        text = card(rank=8, refused_by_vllm="it has trained biases (lora_bias)")
        assert r"vLLM does not load it: it has trained biases \(lora\_bias\)." in text
        assert "vllm serve" not in text

    @pytest.mark.parametrize(
        ("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (513, None)]
    )
    def test_max_lora_rank(self, rank, allowed):
        assert max_lora_rank(rank) == allowed

    def test_the_snippet_is_python(self):
        text = card(base_model='a"b\\', base_revision="'\n", rank=1)
        compile(re.search(r"```python\n(.*?)\n```", text, re.S)[1], "card", "exec")

    def test_the_commands_are_shell(self):
        text = card(base_model="$(rm -rf /); `x`", rank=8, command=["echo", "$HOME"])
        assert "vllm serve '$(rm -rf /); `x`' --enable-lora" in text
        assert "echo '$HOME'" in text

    def test_a_base_whose_name_is_an_option_is_none_of_the_command(self):
        text = card(base_model="--trust-remote-code", rank=8)
        assert "vllm serve path/to/the/base/model --enable-lora" in text

    def test_no_secret_is_in_it(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "of-our-own-hub")
        token = "hf_" + "a" * 34
        text = card(
            inputs=[CardAdapter("a", f"https://me:{token}@host/a", "of-our-own-hub")],
            recipe=f"models: [{token}]",
            command=["coremerge", "merge", "--token", "my-own-word", token],
            notes=["from https://host/a?token=my-own-word"],
            base_model="of-our-own-hub",
        )
        assert not any(secret in text for secret in (token, "of-our-own-hub", "my-own-word"))
        assert "coremerge merge --token '***' '***'" in text


class TestEscaping:
    def test_nothing_from_a_file_is_markup(self):
        text = card(
            name=NASTY,
            base_model=NASTY,
            base_revision=NASTY,
            notes=[NASTY],
            recipe=NASTY,
            command=NASTY,
            version=NASTY,
            dtype=NASTY,
            license=NASTY,
            refused_by_vllm=NASTY,
            inputs=[CardAdapter(*[NASTY] * 4, [1], NASTY)],
        )
        outside = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.S | re.M).split("---\n", 2)[2]
        bare = re.sub(r"\\.", "", re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", outside))
        assert not re.search(r"[<>\[\]`]|https?://", bare)
        assert [line for line in outside.split("\n") if line.startswith("#")] == [
            line for line in outside.split("\n") if line.startswith(("# ", "## "))
        ]
        assert outside.count("\n# ") == 1
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)

    @given(st.text())
    @example("a|b\\")
    @example("`")
    def test_a_cell_stays_one_cell(self, text):
        for shown in (code(text), escape(text)):
            assert "\n" not in shown
            assert not re.search(r"(?<!\\)(?:\\\\)*\|", shown)

    @given(st.text(alphabet="`a \n~"))
    def test_a_fence_is_not_closed_by_its_content(self, text):
        first, *lines, last = fence(text, "yaml").split("\n")
        assert first == last + "yaml"
        assert all(last not in line for line in lines)

    @given(st.text())
    def test_a_code_span_is_not_closed_by_its_content(self, text):
        shown = code(text)
        if shown.startswith("`"):
            ticks = re.match("`+", shown)[0]
            assert shown.endswith(ticks)
            assert not re.search(f"(?<!`){ticks}(?!`)", shown[len(ticks) : -len(ticks)])

    @given(st.text())
    def test_clean_is_one_line_of_printable_characters(self, text):
        assert clean(text) == "" or clean(text).isprintable()
        assert clean(clean(text)) == clean(text)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("1. one", r"1\. one"),
            ("- x", r"\- x"),
            ("0.45", "0.45"),
            ("+x", r"\+x"),
            ("=", r"\="),
            ("www.x", r"www\.x"),
        ],
    )
    def test_starts_of_lists_and_links(self, text, shown):
        assert escape(text) == shown


class TestDescribe:
    def adapters(self, tmp_path):
        made = []
        for i, name in enumerate(("a", "b")):
            torch.manual_seed(i)
            update = LowRank(torch.randn(6, 2), torch.randn(2, 5))
            info = Info(base_model="org/base", task_type="CAUSAL_LM")
            Adapter.from_updates({"layer": update}, info=info).save(tmp_path / name)
            made.append(coremerge.load(tmp_path / name))
        return made

    def test_from_a_merge(self, tmp_path):
        inputs = self.adapters(tmp_path)
        result = coremerge.merge(inputs, Recipe(rank=1))
        text = model_card(describe(result, command="coremerge merge a b", notes=["one more"]))
        for name in ("a", "b"):
            weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
            assert hashlib.sha256(weights).hexdigest() in text
        assert "one more" in text
        assert "| rank | 1 |" in text
        (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)\n```", text, re.S)[1])
        assert read_recipe(tmp_path / "recipe.yaml").recipe == result.plan.recipe

    def test_what_the_method_keeps_of_each_adapter_is_said(self, tmp_path):
        inputs = self.adapters(tmp_path)
        cut = model_card(describe(coremerge.merge(inputs, Recipe(method="tsv", parameters={"rank": 1}))))
        assert r"- tsv \(rank=1\) keeps at most 1 direction of each adapter: of its energy" in cut
        assert "Nothing: every module" not in cut
        whole = model_card(describe(coremerge.merge(inputs, Recipe(method="sum"))))
        assert "Nothing: every module" in whole

    def test_what_made_the_adapters_equal_is_said(self, tmp_path):
        result = coremerge.merge(self.adapters(tmp_path))
        assert "norms: made equal before merging: a × " in model_card(describe(result))

    def test_a_cut_of_the_result_is_said_once(self, tmp_path):
        inputs = self.adapters(tmp_path)
        for rank in (1, 3):
            text = model_card(describe(coremerge.merge(inputs, Recipe(method="sum", rank=rank))))
            assert text.count(f"the cut to rank {rank} loses") == 1

    def test_hashes_are_optional(self, tmp_path):
        described = describe(coremerge.merge(self.adapters(tmp_path)), hashes=False, relation="merge")
        assert all(each.sha256 is None for each in described.inputs)
        assert described.rank is None

    @pytest.mark.parametrize(
        ("name", "said", "expected"),
        [
            ("model.layers.0.self_attn.q_proj", None, "CAUSAL_LM"),
            ("model.layers.0.self_attn.q_proj", "SEQ_CLS", "SEQ_CLS"),
            ("encoder.layer.0.attention.self.query", None, None),
        ],
    )
    def test_a_decoders_head_is_known_by_its_modules(self, name, said, expected):
        made = Adapter.from_updates({name: LowRank(torch.ones(6, 1), torch.ones(1, 5))}, info=Info(task_type=said))
        assert describe(coremerge.merge([made])).task_type == expected

    @pytest.mark.parametrize(
        ("info", "biases", "why"),
        [
            (Info(), {"layer": torch.ones(6)}, "lora_bias"),
            (Info(layer_replication=((0, 1),)), {}, "layer_replication"),
            (Info(modules_to_save=("head",)), {}, "modules_to_save"),
            (Info(modules_to_save=("score",)), {}, None),
        ],
    )
    def test_what_vllm_refuses(self, info, biases, why):
        kinds = {"layer": Module((6, 5), 2)}
        extras = {f"{name}.weight": torch.ones(2) for name in info.modules_to_save}
        made = Adapter(
            kinds,
            lambda _: LowRank(torch.ones(6, 2).double(), torch.ones(2, 5).double()),
            info=info,
            biases=biases,
            extras=extras,
        )
        said = describe(coremerge.merge([made])).refused_by_vllm
        assert (why in said) if why else said is None
