"""W + Δ in the base's own files: transformers loads them, and they compute what PEFT computes."""

import copy
import errno
import json
import os
import re
import shutil
import threading
from typing import ClassVar

import pytest
import torch
from layers import Net, adapter, changed, update
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import coremerge
from coremerge.adapter import Adapter, Info, Module
from coremerge.errors import ConfigError, MismatchError, OutputError, SourceError, TensorError, UnsupportedError
from coremerge.formats import base_weights, into
from coremerge.formats.into import plan_into, save_into
from coremerge.lowrank import LowRank
from coremerge.pipeline import merge_files
from coremerge.recipe import Recipe
from posted import Posted

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

# Logits are compared to 1e-4 of theirs, and 1e-5: see LAYERS among the tests' tolerances.

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TOKENS = torch.tensor([[1, 5, 7, 2]])


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, **settings)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def tied(folder, *, both):
    """A base with tied weights; ``both`` tables may be in its file all the same."""
    llama(tie_word_embeddings=True).save_pretrained(folder)
    if both:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bert(kind=BertModel, **settings):
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL, **settings)).eval()


def trained(model, folder, **settings):
    """A PEFT model with random values, and its saved adapter."""
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.normal_()
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft.eval(), coremerge.load(folder)


def sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def whole(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


QUANTISED = {
    "bitsandbytes, 4 bits": [("weight", (64, 1), torch.uint8), ("weight.absmax", (2,), torch.float32)],
    "bitsandbytes, 8 bits": [("weight", (8, 16), torch.int8), ("SCB", (8,), torch.float32)],
    "gptq": [("qweight", (2, 8), torch.int32), ("qzeros", (1, 1), torch.int32), ("scales", (1, 8), torch.float16)],
    "awq": [("qweight", (16, 1), torch.int32), ("qzeros", (1, 1), torch.int32), ("scales", (1, 8), torch.float16)],
    "compressed-tensors": [("weight_packed", (8, 2), torch.int32), ("weight_scale", (8, 1), torch.bfloat16)],
    "fp8": [("weight", (8, 16), torch.float8_e4m3fn), ("weight_scale_inv", (1, 1), torch.float32)],
}
"""Tensors beside one module of 16 inputs and 8 outputs, as each kind stores them."""


def plain_base(folder, tensors, **files):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


class TestTransformersLoads:
    def test_sharded_llama(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        peft, made = trained(llama(), tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
        saved = save_into(base, made, tmp_path / "out", threads=3)
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits,
            peft(TOKENS).logits,
            rtol=1e-4,
            atol=1e-5,
        )
        assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
        assert saved.notes == ()
        assert {p.name for p in saved.weights} == {p.name for p in base.glob("*.safetensors")}
        index = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "out")]
        assert index[0]["weight_map"] == index[1]["weight_map"]
        assert index[0]["metadata"]["total_size"] == index[1]["metadata"]["total_size"] == saved.bytes

    def test_what_is_not_adapted_is_copied_byte_for_byte(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        _, made = trained(llama(), tmp_path / "a", target_modules=["q_proj"])
        save_into(base, made, tmp_path / "out")
        before, after = whole(base), whole(tmp_path / "out")
        different = {key for key in before if not torch.equal(before[key], after[key])}
        assert different == {f"{name}.weight" for name in made}

    def test_gpt2_without_the_prefix_in_the_file(self, tmp_path):
        model = gpt2()
        model.transformer.save_pretrained(tmp_path / "base")
        settings = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
        peft, made = trained(gpt2(), tmp_path / "a", **settings)
        saved = save_into(tmp_path / "base", made, tmp_path / "out")
        assert "without its prefix 'transformer.'" in saved.notes[0]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-4)

    def test_bert_with_a_prefix_in_the_file_only(self, tmp_path):
        bert(BertForSequenceClassification).save_pretrained(tmp_path / "base")
        peft, made = trained(
            bert(BertForSequenceClassification).bert, tmp_path / "a", target_modules=["query", "word_embeddings"]
        )
        saved = save_into(tmp_path / "base", made, tmp_path / "out")
        assert "with the prefix 'bert.' before it" in saved.notes[0]
        loaded = AutoModel.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS)[0], peft(TOKENS)[0], rtol=1e-4, atol=1e-5)

    def test_a_trained_head_replaces_the_bases(self, tmp_path):
        bert(BertForSequenceClassification).save_pretrained(tmp_path / "base")
        peft, made = trained(
            bert(BertForSequenceClassification), tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS"
        )
        saved = save_into(tmp_path / "base", made, tmp_path / "out")
        assert "taken whole from the adapter: classifier.bias, classifier.weight" in " ".join(saved.notes)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shards", [False, True])
    def test_a_trained_head_that_the_base_lacks_is_added(self, tmp_path, shards):
        model = bert(BertForSequenceClassification)
        if shards:
            sharded(model.bert, tmp_path / "base")
        else:
            model.bert.save_pretrained(tmp_path / "base")
        peft, made = trained(model, tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
        saved = save_into(tmp_path / "base", made, tmp_path / "out")
        assert "added, for the base has no such tensor: classifier.bias, classifier.weight" in " ".join(saved.notes)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-5)
        if shards:
            index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole(tmp_path / "out").values())
            assert "classifier.weight" in index["weight_map"]

    def test_trained_token_rows(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        peft, made = trained(
            llama(), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 2]}
        )
        save_into(base, made, tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-5)

    def test_an_output_layer_of_its_own_unties(self, tmp_path):
        llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
        _, made = trained(llama(), tmp_path / "a", target_modules=["q_proj"])
        head = torch.randn(40, 16)
        made = Adapter(made.modules, made.__getitem__, extras={"lm_head.weight": head}, info=made.info)
        saved = save_into(tmp_path / "base", made, tmp_path / "out")
        assert "tie_word_embeddings was switched off" in " ".join(saved.notes)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded.lm_head.weight, head)
        assert not torch.equal(loaded.model.embed_tokens.weight, head)

    @pytest.mark.parametrize("both", [False, True])
    def test_token_rows_of_tied_weights_change_both_ends(self, tmp_path, both):
        rows = {"trainable_token_indices": {"embed_tokens": [7, 2]}}
        peft, made = trained(llama(tie_word_embeddings=True), tmp_path / "a", target_modules=["q_proj"], **rows)
        saved = save_into(tied(tmp_path / "base", both=both), made, tmp_path / "out")
        assert saved.notes == ()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    @pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # PEFT's, and rightly so
    def test_one_of_two_tied_tables_in_a_file_unties_them(self, tmp_path, target):
        peft, made = trained(llama(tie_word_embeddings=True), tmp_path / "a", target_modules=[target])
        saved = save_into(tied(tmp_path / "base", both=True), made, tmp_path / "out")
        assert "tie_word_embeddings was switched off" in " ".join(saved.notes)
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(loaded(TOKENS).logits, peft(TOKENS).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("inner", [{"tie_word_embeddings": True, "hidden_size": 2}, {"hidden_size": 2}])
    def test_unties_a_text_config_too(self, tmp_path, inner):
        text = json.dumps({"dtype": "float32", "text_config": inner})
        base = plain_base(tmp_path / "base", {"a.weight": torch.zeros(3, 2)}, config=text)
        made = adapter({"a": Module((3, 2), 1)}, extras={"lm_head.weight": torch.ones(3, 2)})
        save_into(base, made, tmp_path / "out", dtype="float16")
        assert json.loads((tmp_path / "out/config.json").read_text()) == {
            "dtype": "float16",
            "text_config": {"tie_word_embeddings": False, "hidden_size": 2},
            "tie_word_embeddings": False,
        }
        assert {t.dtype for t in whole(tmp_path / "out").values()} == {torch.float16}

    def test_another_dtype(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        peft, made = trained(llama(), tmp_path / "a", target_modules=["q_proj"])
        saved = save_into(base, made, tmp_path / "out", dtype="bf16")
        assert {t.dtype for t in whole(tmp_path / "out").values()} == {torch.bfloat16}
        assert saved.dtype == torch.bfloat16
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == torch.bfloat16
        # bfloat16 has 8 bits
        torch.testing.assert_close(loaded(TOKENS).logits.float(), peft(TOKENS).logits, rtol=0.1, atol=0.02)

    def test_pefts_merge_and_ours_agree_in_bf16(self, tmp_path):
        base = sharded(llama().bfloat16(), tmp_path / "base")
        _, made = trained(llama(), tmp_path / "a", target_modules=["q_proj"])
        save_into(base, made, tmp_path / "out")
        before, after = whole(base), whole(tmp_path / "out")
        name = "model.layers.1.self_attn.q_proj"
        exact = before[f"{name}.weight"].double() + made[name].dense()
        assert torch.equal(after[f"{name}.weight"], exact.to(torch.bfloat16))


class TestLayers:
    KINDS: ClassVar = {
        "block.linear": Module((5, 6), 2),
        "block.embed": Module((4, 9), 3, "embedding"),
        "conv1": Module((4, 6), 1, "conv1d", (3,)),
        "conv2": Module((4, 12), 2, "conv2d", (2, 3)),
        "conv3": Module((3, 16), 2, "conv3d", (2, 2, 2)),
    }

    def test_every_kind_with_biases(self, tmp_path, monkeypatch):
        monkeypatch.setattr(into, "ENTRIES", 13)  # several blocks of rows
        made = adapter(self.KINDS, biases={"block.linear": torch.arange(5.0), "conv2": torch.ones(4)})
        base = plain_base(tmp_path / "base", Net(torch.float64).state_dict())
        save_into(base, made, tmp_path / "out", threads=2)
        expected = changed(Net(torch.float64), made).state_dict()
        torch.testing.assert_close(whole(tmp_path / "out"), dict(expected), rtol=1e-12, atol=1e-12)  # all in float64

    def test_an_embedding_with_new_rows(self, tmp_path):
        kinds = {"block.embed": self.KINDS["block.embed"]}
        rows = torch.randn(2, 4)
        made = adapter(
            kinds,
            extras={"block.embed.token_adapter.trainable_tokens_delta": rows},
            info=Info(token_indices={"embed": (8, 0)}),
        )
        base = plain_base(tmp_path / "base", Net().state_dict())
        save_into(base, made, tmp_path / "out")
        expected = Net().block["embed"].weight.detach().double()
        expected[[8, 0]] = rows.double()
        expected += made["block.embed"].dense().mT
        torch.testing.assert_close(whole(tmp_path / "out")["block.embed.weight"], expected.float())

    def test_in_proj_of_an_attention_layer(self, tmp_path):
        mha = nn.MultiheadAttention(6, 2)
        base = plain_base(tmp_path / "base", {f"mha.{key}": value for key, value in mha.state_dict().items()})
        made = adapter({"mha": Module((18, 6), 2)})
        save_into(base, made, tmp_path / "out")
        expected = mha.in_proj_weight.detach() + made["mha"].dense()
        torch.testing.assert_close(whole(tmp_path / "out")["mha.in_proj_weight"], expected.float())

    def test_other_tensors_of_any_dtype_survive(self, tmp_path):
        tensors = {
            "a.weight": torch.ones(2, 3),
            "scalar": torch.tensor(3.5),
            "none": torch.ones(0, 4),
            "mask": torch.tensor([True, False]),
            "ids": torch.arange(3),
            "f8": torch.ones(5).to(torch.float8_e4m3fn),
            "inf": torch.tensor([-torch.inf, 1.0]),
            "u16": torch.arange(3).to(torch.uint16),
        }
        base = plain_base(tmp_path / "base", tensors)
        made = adapter({"a": Module((2, 3), 1)})
        for dtype in (None, "float64"):
            save_into(base, made, tmp_path / str(dtype), dtype=dtype)
            after = whole(tmp_path / str(dtype))
            assert after.keys() == tensors.keys()
            for key in tensors.keys() - {"a.weight"}:
                assert torch.equal(after[key].double(), tensors[key].double())
            assert after["f8"].dtype == torch.float8_e4m3fn
            assert after["scalar"].dtype == (torch.float64 if dtype else torch.float32)

    def test_tensors_of_several_blocks_are_copied_whole(self, tmp_path, monkeypatch):
        monkeypatch.setattr(base_weights, "BLOCK", 7)
        tensors = {"a.weight": torch.ones(2, 3), "b": torch.randn(5, 3), "c": torch.arange(5)}
        base = plain_base(tmp_path / "base", tensors)
        save_into(base, adapter({"a": Module((2, 3), 1)}), tmp_path / "out", threads=2)
        assert all(torch.equal(whole(tmp_path / "out")[key], tensors[key]) for key in "bc")

    @pytest.mark.parametrize(("config", "tied"), [("{}", False), ('{"tie_word_embeddings": true}', True)])
    def test_an_output_layer_is_tied_only_if_the_config_says_so(self, tmp_path, config, tied):
        tensors = {name: torch.zeros(5, 2) for name in ("embed_tokens.weight", "lm_head.weight", "other.weight")}
        base = plain_base(tmp_path / "base", tensors | {"a.weight": torch.ones(2, 3)}, config=config)
        rows = {"embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 2)}
        info = Info(token_indices={"embed_tokens": (3,)})
        save_into(base, adapter({"a": Module((2, 3), 1)}, extras=rows, info=info), tmp_path / "out")
        changed = {key for key in tensors if whole(tmp_path / "out")[key].any()}
        assert changed == {"embed_tokens.weight", *(["lm_head.weight"] if tied else [])}

    def test_square_weights_go_by_the_flag(self, tmp_path):
        base = plain_base(tmp_path / "base", {"a.weight": torch.zeros(4, 4)})
        for flag in (False, True):
            made = adapter({"a": Module((4, 4), 2)}, info=Info(fan_in_fan_out=flag))
            save_into(base, made, tmp_path / str(flag))
            dense = made["a"].dense()
            torch.testing.assert_close(whole(tmp_path / str(flag))["a.weight"], (dense.mT if flag else dense).float())


class Tower(nn.Module):
    """Attention as torch has it, in blocks as CLIP's; or in torch's own encoder layer."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        blocks = [self.own() if own else self.block() for _ in range(2)]
        self.visual = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})

    @staticmethod
    def own():
        return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    @staticmethod
    def block():
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True), "proj": nn.Linear(8, 8)})

    def forward(self, x):
        for block in self.visual["resblocks"]:
            x = block["proj"](block["attn"](x, x, x)[0]) if isinstance(block, nn.ModuleDict) else block(x)
        return x


class TestAttentionOfTorch:
    """PEFT adds an out_proj's update twice, in forward and in merge: a base must have it twice, too."""

    @pytest.fixture(params=[False, True], ids=["blocks", "torch's encoder layer"])
    def own(self, request):
        return request.param

    def trained(self, own, folder, **settings):
        targets = ["self_attn", "linear1"] if own else ["attn", "proj"]
        return trained(Tower(own).eval(), folder, target_modules=targets, **settings)

    def check(self, out, own, peft):
        x = torch.randn(3, 5, 8)
        net = Tower(own).eval()
        net.load_state_dict(load_file(out / "model.safetensors"))
        # as in training, for torch's fast path looks past PEFT; in float64, as two layers of steep attention make much
        # of rounding: of float32 3e-4 on one processor; what is left is that of the weights that were written
        twin = copy.deepcopy(peft).train().double()
        torch.testing.assert_close(net.double()(x.double()), twin(x.double()), rtol=1e-4, atol=1e-5)
        net.float()
        for name, value in peft.merge_and_unload().state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)

    def test_twice_as_peft(self, tmp_path, own):
        base = plain_base(tmp_path / "base", Tower(own).state_dict())
        peft, made = self.trained(own, tmp_path / "a")
        saved = save_into(base, made, tmp_path / "out")
        assert [note for note in saved.notes if "out_proj is added twice" in note] == list(saved.notes)
        self.check(tmp_path / "out", own, peft)

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'. 6 LoRA tensor")
    def test_biases_as_peft(self, tmp_path):
        base = plain_base(tmp_path / "base", Tower(own=False).state_dict())
        peft, made = self.trained(False, tmp_path / "a", lora_bias=True)
        saved = save_into(base, made, tmp_path / "out")
        assert any("visual.resblocks.0.attn is left out: PEFT does not add it" in note for note in saved.notes)
        self.check(tmp_path / "out", False, peft)

    def test_under_another_prefix(self, tmp_path):
        base = plain_base(tmp_path / "base", {f"clip.{k}": v for k, v in Tower(own=False).state_dict().items()})
        peft, made = self.trained(False, tmp_path / "a")
        save_into(base, made, tmp_path / "out")
        plain = {key.removeprefix("clip."): value for key, value in whole(tmp_path / "out").items()}
        save_file(plain, tmp_path / "out" / "model.safetensors")
        self.check(tmp_path / "out", False, peft)

    def test_a_merge_of_two(self, tmp_path):
        base = plain_base(tmp_path / "base", Tower(own=False).state_dict(), config="{}")
        self.trained(False, tmp_path / "a")
        self.trained(False, tmp_path / "b")
        recipe = Recipe(method="sum", scale=1.0)
        merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", recipe=recipe)
        merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "out", recipe=recipe, into=base)
        self.check(tmp_path / "out", False, PeftModel.from_pretrained(Tower(own=False), tmp_path / "merged").eval())


class TestRefusals:
    @pytest.fixture
    def base(self, tmp_path):
        tensors = {
            "model.a.weight": torch.zeros(3, 2),
            "model.a.bias": torch.zeros(3),
            "model.b.weight": torch.zeros(5, 2),
        }
        return plain_base(tmp_path / "base", tensors, config="{}")

    def refused(self, error, match, base, made, tmp_path, **options):
        with pytest.raises(error, match=match):
            save_into(base, made, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    def test_a_module_without_a_weight(self, base, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1), "model.c": Module((3, 2), 1)})
        self.refused(
            MismatchError,
            r"base: model\.c\.weight: the base model has no weight for module model\.c\. Give",
            base,
            made,
            tmp_path,
        )

    def test_an_output_layer_that_nothing_is_known_of(self, base, tmp_path):
        made = adapter({"lm_head": Module((3, 2), 1)})
        self.refused(MismatchError, "no weight for module lm_head", base, made, tmp_path)

    def test_another_dtype_for_a_base_quantised_in_part(self, tmp_path):
        quantised = {"b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "b.weight_scale_inv": torch.ones(1)}
        tensors = {"a.weight": torch.zeros(3, 2), **quantised}
        base = plain_base(tmp_path / "base", tensors, config='{"quantization_config": {"quant_method": "fp8"}}')
        made = adapter({"a": Module((3, 2), 1)})
        self.refused(
            UnsupportedError, "quantization_config: .*Leave out the dtype", base, made, tmp_path, dtype="float16"
        )
        save_into(base, made, tmp_path / "out")
        assert all(torch.equal(whole(tmp_path / "out")[key].float(), quantised[key].float()) for key in quantised)

    def test_an_fp8_weight(self, tmp_path):
        base = plain_base(tmp_path / "base", {"a.weight": torch.ones(3, 2).to(torch.float8_e4m3fn)})
        made = adapter({"a": Module((3, 2), 1)})
        self.refused(UnsupportedError, r"a\.weight: a quantised weight \(F8_E4M3\)", base, made, tmp_path)

    def test_another_shape_names_both(self, base, tmp_path):
        made = adapter({"model.a": Module((2, 3), 1)})
        self.refused(
            MismatchError,
            r"model\.a\.weight: the base's weight is \[3, 2\], .* linear layer's, \[2, 3\]",
            base,
            made,
            tmp_path,
        )
        made = adapter({"model.b": Module((3, 7), 1, "embedding")})
        self.refused(MismatchError, r"is \[5, 2\], .* an embedding's, \[7, 3\]", base, made, tmp_path)

    def test_a_part_of_the_rows_may_be_a_shard(self, tmp_path):
        base = plain_base(tmp_path / "base", {"a.weight": torch.zeros(6, 2), "b.weight": torch.tensor(1.0)})
        for rows, said in (
            (3, "in shards .*gather them first"),
            (2, "in shards"),
            (4, "trained on$"),
            (12, "trained on$"),
        ):
            self.refused(MismatchError, said, base, adapter({"a": Module((rows, 2), 1)}), tmp_path)
        self.refused(MismatchError, "trained on$", base, adapter({"b": Module((3, 2), 1)}), tmp_path)

    def test_names_that_match_in_two_ways(self, tmp_path):
        tensors = {"x.a.weight": torch.zeros(3, 2), "y.a.weight": torch.zeros(3, 2)}
        base = plain_base(tmp_path / "base", tensors)
        self.refused(MismatchError, "match the base in 2 ways", base, adapter({"a": Module((3, 2), 1)}), tmp_path)

    def test_prefixes_must_agree(self, tmp_path):
        tensors = {"x.a.weight": torch.zeros(3, 2), "y.b.weight": torch.zeros(3, 2)}
        base = plain_base(tmp_path / "base", tensors)
        made = adapter(dict.fromkeys("ab", Module((3, 2), 1)))
        self.refused(MismatchError, "no weight for module b", base, made, tmp_path)

    def test_a_bias_that_the_base_lacks(self, base, tmp_path):
        made = adapter({"model.b": Module((5, 2), 1)}, biases={"model.b": torch.ones(5)})
        self.refused(MismatchError, r"model\.b\.bias: the adapter trains a bias", base, made, tmp_path)

    @pytest.mark.parametrize("packed", ["model.a.weight", "model.a.qweight"])
    def test_quantised_weights(self, packed, tmp_path):
        base = plain_base(
            tmp_path / "base", {packed: torch.zeros(3, 2, dtype=torch.uint8), "model.a.bias": torch.zeros(3)}
        )
        made = adapter({"model.a": Module((3, 2), 1)})
        self.refused(UnsupportedError, r"quantised weight \(U8\).*Write an adapter", base, made, tmp_path)

    @pytest.mark.parametrize("dtype", [None, "float32"])
    @pytest.mark.parametrize("kind", QUANTISED)
    def test_the_remedy_for_a_quantised_weight_is_one_that_works(self, kind, dtype, tmp_path):
        """Another dtype is no way out of it, nor is leaving it away."""
        tensors = {f"model.a.{name}": torch.zeros(shape, dtype=dtype) for name, shape, dtype in QUANTISED[kind]}
        config = json.dumps({"quantization_config": {"quant_method": kind}})
        base = plain_base(tmp_path / "base", tensors, config=config)
        made = adapter({"model.a": Module((8, 16), 1)})
        message = "quantised weight .*Write an adapter, not a model: .*Or give the base it was quantised from"
        self.refused(UnsupportedError, message, base, made, tmp_path, dtype=dtype)
        made.save(tmp_path / "adapter")
        assert coremerge.load(tmp_path / "adapter").modules.keys() == made.modules.keys()

    def test_a_quantised_bias(self, tmp_path):
        base = plain_base(
            tmp_path / "base", {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3, dtype=torch.int8)}
        )
        made = adapter({"a": Module((3, 2), 1)}, biases={"a": torch.ones(3)})
        self.refused(UnsupportedError, r"a\.bias: a quantised weight \(I8\)", base, made, tmp_path)

    @pytest.mark.parametrize("extra", [torch.ones(4, 2), torch.ones(5, 2, dtype=torch.int64)])
    def test_a_saved_tensor_that_does_not_fit(self, base, extra, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1)}, extras={"model.b.weight": extra})
        self.refused(
            MismatchError,
            r"model\.b\.weight: the base's tensor is F32 \[5, 2\], and the adapter's",
            base,
            made,
            tmp_path,
        )

    def test_a_tensor_both_adapted_and_saved_whole(self, base, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1)}, extras={"model.a.weight": torch.ones(3, 2)})
        self.refused(MismatchError, r"model\.a\.weight: trained whole", base, made, tmp_path)

    @pytest.mark.parametrize(("ids", "width"), [((1, 5), 2), ((0, 1), 3)])
    def test_token_rows_that_do_not_fit(self, base, ids, width, tmp_path):
        rows = {"model.b.token_adapter.trainable_tokens_delta": torch.ones(2, width)}
        made = adapter({"model.a": Module((3, 2), 1)}, extras=rows, info=Info(token_indices={"model.b": ids}))
        self.refused(MismatchError, r"model\.b\.weight: rows for tokens up to", base, made, tmp_path)

    def test_token_rows_without_a_table(self, base, tmp_path):
        rows = {"model.c.token_adapter.trainable_tokens_delta": torch.ones(1, 2)}
        made = adapter({"model.a": Module((3, 2), 1)}, extras=rows, info=Info(token_indices={"model.c": (1,)}))
        self.refused(MismatchError, "table is missing", base, made, tmp_path)

    def test_a_sum_that_overflows(self, tmp_path):
        base = plain_base(tmp_path / "base", {"a.weight": torch.full((2, 2), 6e4).half()})
        made = Adapter.from_updates({"a": LowRank(torch.full((2, 1), 6e4), torch.ones(1, 2))})
        self.refused(TensorError, r"a\.weight: values up to 1.2e\+05 do not fit float16", base, made, tmp_path)

    def test_a_weight_that_no_longer_fits(self, tmp_path):
        tensors = {"a.weight": torch.ones(2, 2), "b": torch.full((3,), 1e5)}
        base = plain_base(tmp_path / "base", tensors)
        made = adapter({"a": Module((2, 2), 1)})
        self.refused(TensorError, "b: values up to 1e\\+05 do not fit float16", base, made, tmp_path, dtype="fp16")

    def test_repeated_layers_and_nested_attention(self, base, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1)}, info=Info(layer_replication=((0, 1), (0, 1))))
        self.refused(UnsupportedError, "layer_replication", base, made, tmp_path)
        made = adapter({"model.base_layer.a": Module((3, 2), 1)})
        self.refused(UnsupportedError, "model is no attention layer", base, made, tmp_path)

    def test_an_unknown_dtype(self, base, tmp_path):
        self.refused(ConfigError, "int4", base, adapter({"model.a": Module((3, 2), 1)}), tmp_path, dtype="int4")

    def test_the_base_is_never_overwritten(self, base, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1)})
        for path in (base, tmp_path):
            with pytest.raises(OutputError, match="holds an input"):
                save_into(base, made, path, overwrite=True)
        assert load_file(base / "model.safetensors").keys()

    def test_overwrite(self, base, tmp_path):
        made = adapter({"model.a": Module((3, 2), 1)})
        save_into(base, made, tmp_path / "out")
        with pytest.raises(OutputError, match="not empty"):
            save_into(base, made, tmp_path / "out")
        save_into(base, made, tmp_path / "out", overwrite=True)

    def test_an_interruption_leaves_nothing(self, base, tmp_path):
        def load(name):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save_into(base, Adapter({"model.a": Module((3, 2), 1)}, load), tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"base"}

    def test_no_thread_outlives_an_interruption(self, base, tmp_path):
        def progress(done, count):
            raise KeyboardInterrupt

        made = adapter({"model.a": Module((3, 2), 1)})
        with pytest.raises(KeyboardInterrupt) as raised:
            save_into(base, made, tmp_path / "out", threads=3, progress=progress)
        assert raised.tb  # which holds all frames
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("coremerge")]
        assert {p.name for p in tmp_path.iterdir()} == {"base"}

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            ("os.pwrite", "model.safetensors"),
            ("os.fsync", "model.safetensors"),
            ("shutil.copyfileobj", "config.json"),
        ],
    )
    def test_a_full_disk_names_the_file_that_was_wanted(self, base, tmp_path, monkeypatch, call, name):
        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(call, fail)
        made = adapter({"model.a": Module((3, 2), 1)})
        self.refused(OutputError, f"{tmp_path / 'out' / name}: the disk is full", base, made, tmp_path)


class TestBase:
    MADE = adapter({"a": Module((3, 2), 1)})
    TENSORS: ClassVar = {"a.weight": torch.zeros(3, 2)}

    @pytest.fixture
    def base(self, tmp_path):
        return plain_base(tmp_path / "base", self.TENSORS)

    def test_what_is_copied_and_what_is_not(self, base, tmp_path):
        for name in (
            "config.json", "tokenizer.json", "README.md", "1_Pooling/config.json", "2_Dense/model.safetensors",
            "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", ".git/config", "pytorch_model.bin.index.json",
        ):  # fmt: skip
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text("{}")
        saved = save_into(base, self.MADE, tmp_path / "out", files={"README.md": "the card"})
        found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert found == {
            "model.safetensors", "config.json", "tokenizer.json", "README.md", "1_Pooling/config.json",
            "2_Dense/model.safetensors",
        }  # fmt: skip
        assert (tmp_path / "out/README.md").read_text() == "the card"
        assert "left out, for they hold the base's weights: onnx, pytorch_model.bin" in " ".join(saved.notes)

    def test_same_bytes_for_any_number_of_threads(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        _, made = trained(llama(), tmp_path / "a", target_modules=["q_proj", "k_proj"])
        hashes = [save_into(base, made, tmp_path / f"out{n}", threads=n).sha256 for n in (1, 4)]
        assert hashes[0] == hashes[1]

    def test_the_plan_knows_before_anything_is_read(self, base):
        def load(name):
            raise AssertionError("must not be asked")

        plan = plan_into(base, Adapter(self.MADE.modules, load))
        assert plan.size == 24
        assert plan.notes == ()

    def test_progress(self, base, tmp_path):
        seen = []
        save_into(base, self.MADE, tmp_path / "out", progress=lambda done, count: seen.append((done, count)))
        assert seen == [(1, 1)]

    def test_from_the_hubs_cache(self, base, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        cache = tmp_path / "models--org--base"
        snapshot = cache / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("a" * 40)
        for inside in ("model.safetensors", "sub/model.safetensors"):
            (snapshot / inside).parent.mkdir(exist_ok=True)
            blob = cache / "blobs" / inside.replace("/", "-")
            shutil.copy(base / "model.safetensors", blob)
            (snapshot / inside).symlink_to(blob)
        for source in ("org/base", "org/base:sub"):
            plan = plan_into(source, self.MADE, cache_dir=tmp_path)
            assert plan.base.revision == "a" * 40
            plan.write(tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out/model.safetensors").is_symlink()
        with pytest.raises(SourceError, match="no such folder"):
            plan_into("org/base:other", self.MADE, cache_dir=tmp_path)

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "a\\b.safetensors"]
    )
    def test_names_that_lead_elsewhere(self, tmp_path, name):
        (tmp_path / "base").mkdir()
        (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
        with pytest.raises(SourceError, match=r"weight_map = .*not the name of a safetensors file"):
            plan_into(tmp_path / "base", self.MADE)

    @pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
    def test_an_index_without_a_map(self, tmp_path, content):
        (tmp_path / "base").mkdir()
        (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(SourceError, match="has no weight_map"):
            plan_into(tmp_path / "base", self.MADE)

    def test_a_missing_shard(self, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "x.safetensors"}}')
        with pytest.raises(SourceError, match=r"x\.safetensors: this shard is missing"):
            plan_into(tmp_path / "base", self.MADE)

    def test_a_tensor_in_two_shards(self, tmp_path):
        (tmp_path / "base").mkdir()
        for name in "xy":
            save_file(self.TENSORS, tmp_path / f"base/{name}.safetensors")
        index = {"weight_map": {"a.weight": "x.safetensors", "b": "y.safetensors"}}
        with pytest.raises(SourceError, match="several safetensors files and no"):
            plan_into(tmp_path / "base", self.MADE)
        (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SourceError, match=r"a\.weight: in both x"):
            plan_into(tmp_path / "base", self.MADE)

    def test_links_out_of_the_folder(self, base, tmp_path):
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "key.txt").write_text("secret")
        for name, target in (
            ("notes.txt", secret / "key.txt"),
            ("folder", secret),
            ("config.json", secret / "key.txt"),
        ):
            (base / name).symlink_to(target)
            with pytest.raises(SourceError, match=f"{name}: a link that leads out"):
                plan_into(base, self.MADE)
            (base / name).unlink()
        (base / "model.safetensors").rename(secret / "model.safetensors")
        (base / "model.safetensors").symlink_to(secret / "model.safetensors")
        with pytest.raises(SourceError, match=r"model\.safetensors: a link that leads out"):
            plan_into(base, self.MADE)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_what_is_no_file_is_not_waited_for(self, base, tmp_path):
        os.mkfifo(base / "notes.txt")
        with pytest.raises(SourceError, match=r"notes\.txt: is no plain file"):
            plan_into(base, self.MADE)

    def test_a_cache_in_name_only(self, base, tmp_path):
        """Links in a folder that looks like the hub's cache end at its own blobs, too."""
        snapshot = tmp_path / "models--org--x/snapshots/main"
        shutil.copytree(base, snapshot)
        (tmp_path / "secret").write_text("secret")
        (snapshot / "notes.txt").symlink_to("../../../secret")
        with pytest.raises(SourceError, match=r"notes\.txt: a link that leads out"):
            plan_into(snapshot, self.MADE)

    def test_only_pickles(self, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base/pytorch_model.bin").touch()
        with pytest.raises(UnsupportedError, match=r"only as pickles.*save_pretrained"):
            plan_into(tmp_path / "base", self.MADE)

    def test_not_a_model(self, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base/adapter_config.json").touch()
        with pytest.raises(SourceError, match=r"no model\.safetensors here: this is an adapter"):
            plan_into(tmp_path / "base", self.MADE)
        for missing in (
            tmp_path / "missing",
            "not an id",
            "~nobody-of-this-name/base",
            "a\0b",
            str(tmp_path / "base/adapter_config.json"),
        ):
            with pytest.raises(SourceError, match="no such base model"):
                plan_into(missing, self.MADE)

    def test_one_file_of_another_name(self, base, tmp_path):
        (base / "model.safetensors").rename(base / "weights.safetensors")
        save_into(base, self.MADE, tmp_path / "out")
        torch.testing.assert_close(whole(tmp_path / "out")["a.weight"], self.MADE["a"].dense().float())

    def test_a_base_that_shrinks_meanwhile(self, base, tmp_path):
        def load(name):
            with (base / "model.safetensors").open("r+b") as file:
                file.truncate(90)
            return update(self.MADE.modules[name])

        with pytest.raises(SourceError, match=r"model.safetensors: changed while it was in use"):
            save_into(base, Adapter(self.MADE.modules, load), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("gone", ["model.safetensors", "tokenizer.json"])
    def test_a_base_that_goes_meanwhile(self, base, tmp_path, gone):
        (base / "tokenizer.json").write_text("{}")
        plan = plan_into(base, self.MADE)
        (base / gone).unlink()
        with pytest.raises(SourceError, match=rf"base/{gone}: cannot be read: No such file"):
            plan.write(tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"base"}

    def test_a_base_on_a_broken_disk(self, base, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(SourceError, match=r"base/model\.safetensors: cannot be read: Input/output error"):
            save_into(base, self.MADE, tmp_path / "out")

    def test_an_adapter_is_loaded_by_peft_beside_it(self, tmp_path):
        base = sharded(llama(), tmp_path / "base")
        peft, made = trained(llama(), tmp_path / "a", target_modules=["q_proj"])
        made.save(tmp_path / "again")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
        torch.testing.assert_close(again(TOKENS).logits, peft(TOKENS).logits)


class TestLinks:
    """Files that stay as they are: the base's own, or copies."""

    MADE = adapter({"a": Module((3, 2), 1)})
    CHANGED, SAME = "model-1.safetensors", ["model-2.safetensors", "model-3.safetensors"]

    @pytest.fixture
    def base(self, tmp_path):
        """In three files, of which one changes."""
        folder = tmp_path / "base"
        folder.mkdir()
        home = {"a.weight": self.CHANGED, "b": self.SAME[0], "c": self.SAME[1]}
        for at, (key, name) in enumerate(home.items()):
            save_file({key: torch.full((3, 2), float(at))}, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
        (folder / "config.json").write_text("{}")
        return folder

    def shared(self, folder, base):
        return sorted(one.name for one in base.iterdir() if (folder / one.name).samefile(one))

    def test_links_are_what_copies_would_be(self, base, tmp_path):
        linked, copied = (save_into(base, self.MADE, tmp_path / f"out{link}", link=link) for link in (True, False))
        assert self.shared(linked.path, base) == self.SAME and self.shared(copied.path, base) == []
        assert linked.sha256 == copied.sha256 and linked.bytes == copied.bytes
        assert copied.notes == ()
        (note,) = linked.notes
        assert note.startswith("hard links to the base's own files, which share every later change: model-2")

    def test_another_dtype_leaves_nothing_to_link(self, base, tmp_path):
        saved = save_into(base, self.MADE, tmp_path / "out", link=True, dtype="bf16")
        assert self.shared(saved.path, base) == [] and saved.notes == ()

    def test_a_file_that_something_is_added_to_is_none_of_them(self, base, tmp_path):
        made = adapter({"a": Module((3, 2), 1)}, extras={"score.weight": torch.ones(2, 2)})
        assert plan_into(base, made).untouched == ("model-2.safetensors",)

    @pytest.mark.parametrize(
        ("code", "why"),
        [
            (errno.EXDEV, "the output is on another disk or volume"),
            (errno.EPERM, r"hard links are not possible there \(Operation not permitted\)"),
            (errno.EMLINK, "one of them has as many links as it may have"),
        ],
    )
    def test_where_there_are_no_links_it_copies_and_says_so(self, base, tmp_path, monkeypatch, code, why):
        def fail(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", fail)
        saved = save_into(base, self.MADE, tmp_path / "out", link=True)
        assert self.shared(saved.path, base) == []
        assert re.fullmatch(f"copied, not linked: model-2.safetensors, model-3.safetensors: {why}", saved.notes[0])
        monkeypatch.undo()
        assert saved.sha256 == save_into(base, self.MADE, tmp_path / "copy").sha256

    def test_other_errors_are_errors(self, base, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "link", fail)
        with pytest.raises(OutputError, match=r"out/model-2\.safetensors: the disk is full"):
            save_into(base, self.MADE, tmp_path / "out", link=True)
        assert not (tmp_path / "out").exists()

    def test_a_link_leads_to_the_caches_own_file(self, base, tmp_path):
        cache = tmp_path / "models--org--base"
        snapshot = cache / "snapshots" / ("a" * 40)
        (cache / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in base.iterdir():
            shutil.copy(file, cache / "blobs" / file.name)
            (snapshot / file.name).symlink_to(cache / "blobs" / file.name)
        saved = save_into(snapshot, self.MADE, tmp_path / "out", link=True)
        assert self.shared(saved.path, cache / "blobs") == self.SAME
        assert not any(file.is_symlink() for file in saved.path.iterdir())

    def test_links_need_no_room(self, base, tmp_path, monkeypatch):
        plan = plan_into(base, self.MADE)
        assert (plan.size, plan.written(), plan.written(link=True)) == (72, 72, 24)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 70, 30))
        with pytest.raises(OutputError, match="the disk has"):
            plan.write(tmp_path / "out")
        plan.write(tmp_path / "out", link=True)

    def test_a_base_that_changes_meanwhile(self, base, tmp_path):
        plan = plan_into(base, self.MADE)
        os.utime(base / self.SAME[1], ns=(0, 0))
        with pytest.raises(SourceError, match=r"base/model-3\.safetensors: changed while it was in use"):
            plan.write(tmp_path / "out", link=True)
        (base / self.SAME[1]).unlink()
        with pytest.raises(SourceError, match=r"base/model-3\.safetensors: cannot be read: No such file"):
            plan.write(tmp_path / "out", link=True)

    def test_the_base_survives_its_result(self, base, tmp_path):
        before = whole(base)
        save_into(base, self.MADE, tmp_path / "out", link=True)
        save_into(base, self.MADE, tmp_path / "out", link=True, overwrite=True, dtype="bf16")
        shutil.rmtree(tmp_path / "out")
        assert all(torch.equal(before[key], tensor) for key, tensor in whole(base).items())

    @pytest.mark.parametrize("executor", [None, Posted()])
    @pytest.mark.parametrize("resume", [False, True])
    def test_whoever_writes_the_rest(self, base, tmp_path, executor, resume):
        self.MADE.save(tmp_path / "A")
        how = {"into": base, "link": True, "resume": resume, "executor": executor}
        merged = merge_files([tmp_path / "A"], tmp_path / "out", **how)
        assert self.shared(merged.saved.path, base) == self.SAME and "hard links" in merged.notes[-1]
        again = merge_files([tmp_path / "A"], tmp_path / "copy", into=base)
        assert again.saved.sha256 == merged.saved.sha256

    def test_what_was_linked_before_a_crash_stays_linked(self, base, tmp_path):
        self.MADE.save(tmp_path / "A")
        out, how = tmp_path / "out", {"into": base, "resume": True, "threads": 1}

        def stop(stage, done, count):
            if stage == "writing":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_files([tmp_path / "A"], out, **how, link=True, progress=stop)
        with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
            merge_files([tmp_path / "A"], out, **how)
        merged = merge_files([tmp_path / "A"], out, **how, link=True)
        assert self.shared(out, base) == self.SAME and "hard links" in merged.notes[-1]

    def test_links_to_no_base(self, tmp_path):
        self.MADE.save(tmp_path / "A")
        with pytest.raises(ConfigError, match="link: there is no base model"):
            merge_files([tmp_path / "A"], tmp_path / "out", link=True)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_no_more_than_a_part_of_a_tensor_is_read_at_a_time(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(into, "ENTRIES", 60)
    monkeypatch.setattr(base_weights, "BLOCK", 100)
    base = plain_base(tmp_path / "base", {"a.weight": torch.ones(40, 30), "b": torch.ones(700), "c": torch.ones(9, 9)})
    sizes, read = [], base_weights.Shard.read
    monkeypatch.setattr(
        base_weights.Shard,
        "read",
        lambda self, key, offset, size: sizes.append(size) or read(self, key, offset, size),
    )
    save_into(base, adapter({"a": Module((40, 30), 2)}), tmp_path / "out", dtype=dtype)
    assert max(sizes) <= 60 * 4 and sum(sizes) == 4 * (40 * 30 + 700 + 81)
