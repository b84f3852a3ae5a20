"""Files beside adapters: what one has or all agree on is carried over, what differs is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import Recipe, load, merge
from coremerge.batch import run_batch
from coremerge.carried import kind_of
from coremerge.errors import SourceError
from coremerge.pipeline import Merged, merge_files, prepare
from tiny import make_adapter, make_base

OWN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "coremerge.json"}
WEIGHTS = [
    "value_head.safetensors",
    "new_embeddings.safetensors",
    "spectrogram_head.safetensors",
    "non_lora_trainables.bin",
]
TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": '{"x": 1}', "added_tokens.json": '{"<x>": 40}'}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "a", seed=1)
    make_adapter(tmp_path / "b", seed=2)
    return tmp_path


def put(folder: str, name: str, content: float | str | None = None) -> bytes:
    path = Path(folder, name)
    if isinstance(content, str):
        path.write_text(content)
    elif name.endswith(".safetensors"):
        save_file({"summary.weight": torch.full((1, 4), content or 1.0)}, path, metadata={"format": "pt"})
    else:
        torch.save({"summary.weight": torch.full((1, 4), content or 1.0)}, path)
    return path.read_bytes()


def merged(policy: str | None = None, **options: Any) -> Merged:
    return merge_files(["a", "b"], "out", Recipe(extras=policy), overwrite=True, **options)


def others(folder: str = "out") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.name not in OWN}


@pytest.mark.parametrize("name", WEIGHTS)
class TestWeights:
    """Trained weights that are not in the adapter's own file."""

    def test_of_one_adapter_are_carried_over_and_said(self, name: str) -> None:
        content = put("b", name)
        report = merged()
        assert others() == {name: content}
        assert f"{name}: carried over from b" in report.report.warnings
        assert f"{name}: carried over from b" in Path("out/README.md").read_text().replace("\\", "")

    def test_that_are_equal_are_carried_over(self, name: str) -> None:
        content = put("a", name)
        put("b", name)
        merged()
        assert others() == {name: content}

    def test_that_differ_are_left_out_with_a_warning_unless_one_is_named(self, name: str) -> None:
        first, second = put("a", name, 1.0), put("b", name, 3.0)
        assert len(first) == len(second)
        for policy in (None, "average"):
            report = merged(policy)
            assert others() == {}
            said = f"{name}: left out, as it differs between a, b; --extras a takes that one"
            assert said in report.report.warnings and said not in report.plan.decisions
        for policy, kept in (("a", {name: first}), ("b", {name: second}), ("drop", {})):
            report = merged(policy)
            assert others() == kept
            assert any("as asked" in text for text in report.plan.decisions if name in text)

    def test_are_never_unpickled(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Path("a", name).write_bytes(b"\x80\x04cos\nsystem\n")
        monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
        merged()
        assert others() == {name: b"\x80\x04cos\nsystem\n"}

    def test_go_into_a_base_model_too(self, name: str) -> None:
        content = put("b", name)
        make_base(Path("base"))
        merged(into="base")
        assert Path("out", name).read_bytes() == content


def test_a_name_that_the_base_has_is_not_carried_over_and_said() -> None:
    put("b", "model.safetensors")
    make_base(Path("base"))
    report = merged(into="base")
    assert "summary.weight" not in load_file("out/model.safetensors")
    assert "model.safetensors: not carried over, as the base's weights are called so" in report.notes


class TestTokenizers:
    """Files that only make sense together."""

    def test_of_one_adapter_is_carried_over(self) -> None:
        kept = {name: put("a", name, text) for name, text in TOKENIZER.items()}
        kept["chat_template.jinja"] = put("a", "chat_template.jinja", "{{ messages }}")
        report = merged()
        assert others() == kept
        assert {"tokenizer: carried over from a", "chat template: carried over from a"} <= {*report.report.warnings}

    def test_that_are_equal_where_both_have_a_file_are_joined(self) -> None:
        kept = {name: put("a", name, text) for name, text in TOKENIZER.items()}
        put("b", "tokenizer.json", TOKENIZER["tokenizer.json"])
        merged()
        assert others() == kept

    def test_that_differ_are_left_out_and_said_unless_one_is_named(self) -> None:
        for name, text in TOKENIZER.items():
            put("a", name, text)
        other = put("b", "tokenizer_config.json", '{"x": 2}')
        template = put("b", "chat_template.jinja", "{{ messages }}")
        (said,) = [text for text in merged().report.warnings if text.startswith("tokenizer")]
        assert said.startswith("tokenizer: left out, as it differs between a, b (tokenizer_config.json); --extras a")
        assert others() == {"chat_template.jinja": template}
        merged("b")
        assert others() == {"tokenizer_config.json": other, "chat_template.jinja": template}

    def test_replaces_the_bases_own(self) -> None:
        make_base(Path("base"))
        put("base", "tokenizer.json", "the base's")
        content = put("b", "tokenizer.json", "with more tokens")
        merged(into="base")
        assert Path("out/tokenizer.json").read_bytes() == content


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "optimizer.bin", "scheduler.pt", "lr_scheduler.bin", "rng_state_3.pth", "random_states_0.pkl",
     "training_args.bin", "trainer_state.json", "scaler.pt", "README.md", "config.json", "adapter.gguf"],
)  # fmt: skip
def test_what_is_trainings_own_is_left_without_a_word(name: str) -> None:
    assert kind_of(name) is None
    Path("a", name).write_bytes(b"x")
    report = merged()
    assert others() == {} and not any(name in text for text in (*report.notes, *report.report.warnings))


class TestLeftUnread:
    """Weights that are somebody else's are said, not carried over."""

    def check(self, said: str) -> None:
        report = merged()
        assert others() == {} and any(said in text for text in (*report.notes, *report.report.warnings))

    def test_the_same_adapter_as_a_pickle(self) -> None:
        put("a", "adapter_model.bin")
        self.check("a: adapter_model.bin beside it: another adapter, or the same once more; left unread")

    def test_another_adapter(self) -> None:
        make_adapter(Path("c"))
        Path("c/adapter_model.safetensors").rename("a/older.safetensors")
        self.check("a: older.safetensors beside it: another adapter; left unread")

    def test_a_whole_model(self) -> None:
        put("a", "model-00001-of-00002.safetensors")
        put("a", "config.json", "{}")
        self.check("a: model-00001-of-00002.safetensors beside it: weights of a whole model; left unread")

    def test_a_pointer(self) -> None:
        put("a", "tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        self.check("a: tokenizer.json beside it is not carried over: it is a Git LFS pointer")

    def test_what_is_too_large_for_a_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coremerge.formats.beside.LARGEST", 100)
        put("a", "value_head.safetensors")
        self.check("a: value_head.safetensors beside it is not carried over: it has 0.0 GB")


def test_weights_beside_a_file_that_was_named_are_other_adapters() -> None:
    Path("a/adapter_model.safetensors").rename("a/step-1.pt.safetensors")
    put("a", "step-2.pt")
    head = put("a", "value_head.bin")
    merge_files(["a/step-1.pt.safetensors", "b"], "out")
    assert others() == {"value_head.bin": head}


class TestPromises:
    """What holds for adapters holds for what they carry."""

    def test_a_rerun_has_the_same_bytes(self) -> None:
        put("a", "value_head.safetensors")
        put("b", "tokenizer.json", "{}")
        seen = set()
        for _ in range(2):
            merged()
            files = sorted(Path("out").iterdir())
            seen.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
        assert len(seen) == 1

    def test_a_merge_of_merges_and_a_copy_carry_on(self) -> None:
        content = put("a", "value_head.safetensors")
        merged()
        merge_files(["out", "b"], "again")
        load("again").save("copy")
        assert others("again") == others("copy") == {"value_head.safetensors": content}

    def test_in_python_too(self) -> None:
        content = put("a", "value_head.safetensors")
        result = merge([load("a"), load("b")])
        result.adapter.save("out")
        assert others() == {"value_head.safetensors": content}

    def test_what_changes_meanwhile_is_noticed(self) -> None:
        put("a", "value_head.safetensors")
        prepared = prepare(["a", "b"])
        put("a", "value_head.safetensors", 9.0)
        with pytest.raises(SourceError, match=r"a/value_head.safetensors: changed while it was in use"):
            prepared.run("out")
        assert not Path("out").exists()

    def test_the_record_has_its_hash(self) -> None:
        content = put("a", "value_head.safetensors")
        merged()
        entry = json.loads(Path("out/coremerge.json").read_text())["inputs"][0]
        assert entry["sha256"]["value_head.safetensors"] == hashlib.sha256(content).hexdigest()

    def test_an_initial_adapters_files_are_not_carried_over(self) -> None:
        make_adapter(Path("c"), seed=3, init_lora_weights="pissa")
        make_adapter(Path("start"), seed=4, init_lora_weights="pissa")
        put("start", "value_head.safetensors")
        merge_files(["c", "b"], "out", initial={"c": "start"})
        assert others() == {}

    def test_resumed_it_is_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = put("a", "value_head.safetensors")
        with monkeypatch.context() as stopped:
            stopped.setattr("coremerge.formats.writer._write_module", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                merge_files(["a", "b"], "out", resume=True)
        merge_files(["a", "b"], "out", resume=True)
        assert others() == {"value_head.safetensors": content}

    @pytest.mark.parametrize("change", ["other", "gone", "new", "lost"])
    def test_a_batch_makes_anew_what_has_changed(self, change: str) -> None:
        put("a", "value_head.safetensors")
        Path("many.yaml").write_text("sets: {s: [a, b]}\n")
        assert run_batch("many.yaml", "all").counts == {"done": 1}
        assert run_batch("many.yaml", "all").counts == {"skipped": 1}
        out = Path("all/s/default/value_head.safetensors")
        if change == "other":
            put("a", "value_head.safetensors", 5.0)
        elif change == "gone":
            Path("a/value_head.safetensors").unlink()
        elif change == "new":
            put("b", "tokenizer.json", "{}")
        else:
            out.unlink()
        assert run_batch("many.yaml", "all", overwrite=True).counts == {"done": 1}
        assert out.exists() == (change != "gone")


@pytest.mark.parametrize(
    ("task", "listed", "kept", "lost"),
    [
        ("SEQ_CLS", ["classifier", "score"], None, "classifier, score"),
        ("SEQ_CLS", ["classifier", "score"], "score.weight", None),
        ("CAUSAL_LM", ["lm_head"], None, "lm_head"),
        ("CAUSAL_LM", ["lm_head", "embed_tokens"], "lm_head.weight", "embed_tokens"),
        (None, ["head", "norm"], "model.norm.weight", "head"),
        (None, None, None, None),
    ],
)
def test_a_head_that_the_config_lists_and_the_file_lacks_is_said(
    task: str | None, listed: list[str] | None, kept: str | None, lost: str | None
) -> None:
    extra = {kept: torch.ones(2, 2)} if kept else None
    make_adapter(Path("c"), task_type=task, modules_to_save=listed, extra=extra)
    said = load("c").info.warnings
    assert [text.partition(" lists ")[2].partition(", and the file")[0] for text in said] == ([lost] if lost else [])
    warned = prepare(["c"]).plan.warnings
    assert [f"c: {text}" for text in said] == [text for text in warned if "modules_to_save" in text]


def test_what_folders_inside_hold_is_said(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    make_adapter(folder / "checkpoint-1")
    for name in ("2_Dense/model.safetensors", "additional_chat_templates/rag.jinja", "runs/events", ".git/x.bin"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x")
    (folder / "global_step1").mkdir()
    (folder / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert [note for note in load(folder).info.notes if "/" in note] == [
        "2_Dense/ beside it (model.safetensors): left unread",
        "additional_chat_templates/ beside it (rag.jinja): left unread",
    ]
