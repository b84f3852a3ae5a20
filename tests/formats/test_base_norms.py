from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge.adapter import Adapter, Module
from coremerge.errors import MismatchError, UnsupportedError
from coremerge.formats import base_norms
from coremerge.formats.base_norms import squared_norms
from coremerge.formats.placing import Edit
from tiny import WIDTH, make_base, modules


def stand_in(shapes: dict[str, tuple[int, int]]) -> Adapter:
    """Without factors: nobody reads them."""
    return Adapter({name: Module(shape, 2) for name, shape in shapes.items()}, {}.__getitem__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 23])
def test_they_are_those_of_the_weights(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(base_norms, "BLOCK", block)
    folder = make_base(tmp_path / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    told = []
    found = squared_norms(folder, stand_in(modules()), progress=lambda *at: told.append(at))
    assert found == pytest.approx(
        {name: float(tensors[f"{name}.weight"].double().square().sum()) for name in modules()}
    )
    assert told == [(i + 1, 4) for i in range(4)]
    some = dict(list(modules().items())[:1])
    assert squared_norms(folder, stand_in(some), threads=1).keys() == some.keys()


def test_of_a_fused_layer_only_the_rows_of_the_part_count():
    found = {"q": 0.0, "v": 0.0}
    parts = (("q", torch.arange(2), torch.tensor([0, 1])), ("v", torch.arange(1), torch.tensor([3])))
    base_norms._add(found, Edit(parts=parts), torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert found == {"q": 3.0, "v": 8.0}


def test_what_has_no_weight_there_is_refused(tmp_path):
    folder = make_base(tmp_path / "base")
    with pytest.raises(MismatchError):
        squared_norms(folder, stand_in({"model.layers.7.self_attn.q_proj": (WIDTH, WIDTH)}))
    with pytest.raises(MismatchError):
        squared_norms(folder, stand_in({"model.layers.0.self_attn.q_proj": (WIDTH + 1, WIDTH)}))


def test_a_quantised_weight_is_refused(tmp_path):
    folder = make_base(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(UnsupportedError):
        squared_norms(folder, stand_in(modules()))
