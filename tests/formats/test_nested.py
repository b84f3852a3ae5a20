"""Layers in layers: what ``.base_layer`` in a name means is read off the file, not off a flag."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

from coremerge import load
from coremerge.errors import TensorError, UnsupportedError
from coremerge.pipeline import merge_files
from coremerge.recipe import Recipe

MODULES = ["model.layers.0.q_proj", "model.layers.1.q_proj"]


@pytest.mark.parametrize("place", ["{}.base_layer", "{}.base_layer.base_layer"])
def test_a_layer_with_an_adapter_around_it_is_the_layer_inside(tmp_path: Path, place: str) -> None:
    tensors = zoo.lora(*(place.format(name) for name in MODULES))
    adapter = load(zoo.by_hand(tmp_path / "a", tensors, r=2, lora_alpha=4))
    assert list(adapter) == MODULES
    assert any("2 layers were wrapped already" in note for note in adapter.info.notes)
    merge_files([tmp_path / "a"], tmp_path / "out", Recipe(method="sum", steps=[], scale=1.0))
    model = zoo.loaded(tmp_path / "out", zoo.Decoder())
    torch.testing.assert_close(zoo.delta(model, MODULES[0]), adapter[MODULES[0]].dense())


def test_a_wrapped_parent_is_the_parent_inside(tmp_path: Path) -> None:
    tensors = zoo.lora("layers.0.mixer.base_layer.in_proj", "layers.0.mixer.base_layer.out_proj")
    adapter = load(zoo.by_hand(tmp_path / "a", tensors, r=2))
    assert list(adapter) == ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj"]


def test_two_adapters_around_one_layer_are_refused(tmp_path: Path) -> None:
    tensors = zoo.lora("mlp.up_proj.base_layer", "mlp.up_proj")
    with pytest.raises(TensorError, match=r"up_proj\.base_layer.*two adapters are around mlp\.up_proj.*scale of one"):
        load(zoo.by_hand(tmp_path / "a", tensors, r=2))


@pytest.mark.parametrize("declared", [["mlp.experts.gate_up_proj"], ["gate_up_proj"], ["router.weight", "w1"]])
def test_declared_experts_that_the_file_lacks_are_said(tmp_path: Path, declared: list[str]) -> None:
    adapter = load(zoo.simple(tmp_path / "a", target_parameters=declared))
    assert len(adapter) == 2
    assert any(f"target_parameters lists {declared[0]}" in note for note in adapter.info.notes)


def test_a_rank_of_ones_own_beside_declared_experts_is_no_expert(tmp_path: Path) -> None:
    tensors = zoo.lora("layers.0.q_proj", rank=4)
    settings = {"r": 2, "rank_pattern": {"q_proj": 4}, "target_parameters": ["experts.w"]}
    assert load(zoo.by_hand(tmp_path / "a", tensors, **settings)).modules["layers.0.q_proj"].rank == 4


@pytest.mark.parametrize("declared", [None, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["down_proj"]])
@pytest.mark.parametrize("names", [("mlp.experts", "mlp.experts.base_layer"), ("mlp.experts.base_layer",)])
def test_experts_are_refused_by_name(tmp_path: Path, declared: list[str] | None, names: tuple[str, ...]) -> None:
    folder = zoo.by_hand(tmp_path / "a", zoo.lora(*names), r=2, target_parameters=declared)
    with pytest.raises(UnsupportedError, match=r"safetensors: base_model.*mlp\.experts\..*expert parameters \(MoE\)"):
        load(folder)


@pytest.mark.parametrize(("name", "declared"), [("mlp.experts", None), ("moe.input_linear", ["input_linear.weight"])])
def test_stacked_experts_are_refused_by_name(tmp_path: Path, name: str, declared: list[str] | None) -> None:
    folder = zoo.by_hand(tmp_path / "a", zoo.lora(name, rank=6), r=2, target_parameters=declared)
    with pytest.raises(UnsupportedError, match="MoE"):
        load(folder)


class Experts(nn.Module):
    """What PEFT adapts by ``target_parameters``, beside a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 5)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Only so that PEFT takes it for a model."""
        result: Tensor = self.q_proj(x)
        return result


@pytest.mark.parametrize(("parameters", "read"), [(["experts.up"], False), (["mlp.experts.up"], True)])
def test_what_peft_itself_writes_with_target_parameters(tmp_path: Path, parameters: list[str], read: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    folder = zoo.save(zoo.adapted(config, Experts()), tmp_path / "a")
    if read:
        assert list(load(folder)) == ["q_proj"]
    else:
        with pytest.raises(UnsupportedError, match=r"experts\.lora_A.*MoE"):
            load(folder)
