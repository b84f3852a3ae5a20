"""A base model from files: no code of its own, and no pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coremerge.errors import SourceError
from coremerge.learning.files import load_model, read_config
from coremerge.learning.processor import load_processor
from families import make_model


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
