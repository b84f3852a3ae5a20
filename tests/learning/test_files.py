"""A base model from files: no code of its own, and no pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertModel

from coremerge.errors import SourceError
from coremerge.learning.files import load_model, read_config, running_dtype
from coremerge.learning.processor import load_processor
from families import make_model
from speakers import make_speaker


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("bert").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_code_beside_a_model_is_not_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    kinds = {kind: f"evil.{kind}" for kind in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    config |= {"model_type": "evil", "auto_map": kinds}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nclass AutoConfig: pass\nclass AutoModel: pass\n")
    says = {"tokenizer_class": "Evil", "processor_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (base / name).write_text(json.dumps(says))
    for head in (False, True):
        with pytest.raises(SourceError, match="the base model cannot be loaded"):
            load_model(base, head=head)
    with pytest.raises(SourceError, match="neither a tokenizer nor an image processor"):
        load_processor(base)
    assert read_config(base) is None
    assert not (base / "ran").exists()


def test_weights_that_are_a_pickle_are_not_read(base: Path) -> None:
    torch.save(make_model("bert").state_dict(), base / "pytorch_model.bin")
    assert load_model(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"the base model cannot be loaded: .*safetensors"):
        load_model(base)


@pytest.mark.parametrize("head", [False, True])
def test_what_transformers_reports_of_a_load_goes_nowhere(
    base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, head: bool
) -> None:
    make_model("llama").save_pretrained(base)  # with a head, which the backbone does not take
    capfd.readouterr()
    assert load_model(base, head=head)
    said = capfd.readouterr()
    assert not said.out and not said.err and not caplog.records


def test_the_callers_bars_and_reports_are_his_again(
    base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load_model(base)
    capfd.readouterr()
    transformers.logging.set_verbosity_warning()
    BertModel.from_pretrained(base)
    assert "Loading weights" in capfd.readouterr().err and "LOAD REPORT" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["layer.1", "word_embeddings"])
def test_weights_that_transformers_makes_up_are_said(base: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if name not in k}, base / "model.safetensors", {"format": "pt"})
    assert load_model(base)
    (record,) = (one for one in caplog.records if one.name.startswith("coremerge"))
    assert "lacks weights of the model, which are random now: " in record.getMessage() and name in record.getMessage()


def test_weights_of_another_shape_are_named(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    wrong = "bert.encoder.layer.0.output.dense.weight"
    save_file(tensors | {wrong: torch.zeros(3, 3)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"cannot be loaded: encoder.layer.0.output.dense.weight: .*\[3, 3\]"):
        load_model(base)


def test_a_library_that_a_base_model_needs_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("\nTimmBackbone requires the timm library but it was not found")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    with pytest.raises(SourceError, match="cannot be loaded: TimmBackbone requires the timm library"):
        load_model(base)


@pytest.mark.parametrize(
    ("stored", "asked", "runs"),
    [
        ("float16", "auto", torch.float32),
        ("float16", "float16", torch.float16),
        ("float16", "bfloat16", torch.bfloat16),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
    ],
)
def test_files_in_float16_do_not_run_in_it_on_a_processor(
    tmp_path: Path, stored: str, asked: str, runs: torch.dtype
) -> None:
    make_model("bert").to(getattr(torch, stored)).save_pretrained(tmp_path)
    assert next(load_model(tmp_path, asked).parameters()).dtype == runs
    assert running_dtype(read_config(tmp_path), device="cuda") == "auto"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_a_model_that_answers_is_loaded_as_one(tmp_path: Path, family: str, name: str) -> None:
    make_speaker(family, tmp_path)
    assert type(load_model(tmp_path, head=True)).__name__ == name
