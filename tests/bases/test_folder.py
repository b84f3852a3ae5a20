"""Folders of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from coremerge.bases.folder import write_model
from coremerge.formats.safetensors_file import SafetensorsFile

CONFIG = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1, image_size=28)
WEIGHTS = Dinov2Model(CONFIG).state_dict()
NORM = "layernorm.bias"


def test_weights_are_stored_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(Dinov2Model, CONFIG, WEIGHTS, tmp_path, torch.bfloat16)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert len(file.entries) == len(WEIGHTS)
    assert {entry.dtype for entry in file.entries.values()} == {"BF16"}
    assert capsys.readouterr() == ("", "")  # no bars


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, "weights are missing: layernorm.bias"),
        ({"other": torch.zeros(2)}, "weights that the model has not: other"),
        ({NORM: torch.zeros(9)}, "weights of another shape: layernorm.bias"),
    ],
)
def test_weights_are_those_of_the_model(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    weights = {name: tensor for name, tensor in (WEIGHTS | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        write_model(Dinov2Model, CONFIG, weights, tmp_path)
