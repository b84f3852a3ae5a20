"""AdaLoRA, whole and pruned, against PEFT's forward pass."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import nn

from coremerge import load
from coremerge.errors import CoremergeError, TensorError


class Pair(nn.Module):
    """Two linear layers and a loss to train on."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


def config(**settings: Any) -> Any:
    return peft.AdaLoraConfig(
        **{"init_r": 6, "target_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"], **settings}
    )


def check(model: Any, folder: Path) -> None:
    adapter = load(folder)
    x = torch.eye(8, dtype=torch.float64)
    for name in ("q_proj", "v_proj"):
        layer = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            forward = (layer(x) - layer.base_layer(x)).T
        # both in float64, in another order
        torch.testing.assert_close(adapter[name].dense(), forward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [1, 7, 2.5, 0])
def test_unpruned_as_pefts_forward(tmp_path: Path, alpha: float) -> None:
    model = zoo.adapted(config(lora_alpha=alpha), Pair())
    check(model, zoo.save(model, tmp_path / "a"))
    assert load(tmp_path / "a").modules["v_proj"].rank == 6


@pytest.mark.parametrize("alpha", [3, 0])
def test_pruned_as_pefts_forward_once_loaded(tmp_path: Path, alpha: int) -> None:
    torch.manual_seed(0)
    model = zoo.adapted(config(lora_alpha=alpha), Pair())
    # ranknum is no weight: PEFT marks it trainable all the same, does not save it, and restores init_r
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimiser = torch.optim.SGD(trained, lr=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(13):
            model(torch.randn(4, 8, dtype=torch.float64)).square().mean().backward()
            optimiser.step()
            model.base_model.update_and_allocate(step)
            optimiser.zero_grad()
    folder = zoo.save(model, tmp_path / "a")
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    kept = {key.split(".")[0]: sum(mask) for key, mask in pattern.items()}
    adapter = load(folder)
    assert {name: m.rank for name, m in adapter.modules.items()} == kept
    assert sum(kept.values()) == 4
    if alpha:
        check(model, folder)
    check(zoo.quietly(peft.PeftModel.from_pretrained, model=Pair().double(), model_id=folder), folder)


def test_a_module_pruned_to_nothing_is_zero(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.x.lora_A": torch.zeros(0, 4),
        "base_model.model.x.lora_B": torch.zeros(3, 0),
        "base_model.model.x.lora_E": torch.zeros(0, 1),
    }
    pattern = {"x.lora_E.default": [False, False]}
    adapter = load(zoo.by_hand(tmp_path / "a", tensors, peft_type="AdaLora", init_r=2, rank_pattern=pattern))
    assert adapter["x"].shape == (3, 4) and adapter["x"].rank == 0
    assert not adapter["x"].dense().any()


def by_hand(folder: Path, rank: int = 2, drop: str = "", **settings: Any) -> Path:
    tensors = {
        "base_model.model.x.lora_A": torch.ones(rank, 4),
        "base_model.model.x.lora_B": torch.ones(3, rank),
        "base_model.model.x.lora_E": torch.ones(rank, 1),
    }
    tensors.pop(f"base_model.model.x.lora_{drop}", None)
    return zoo.by_hand(folder, tensors, **{"peft_type": "ADALORA", "init_r": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 3}, r"adapter_config.json: init_r = 3: x has rank 2 in the file, and the config says 3"),
        ({"init_r": None}, r"init_r = null: .*says 12"),
        ({"rank_pattern": {"x.lora_E": [True, False]}}, r"rank_pattern = .*: x has rank 2 .*says 1"),
        ({"rank_pattern": {"x.lora_E": 2}}, r"rank_pattern.x.lora_E = 2: must be a list of true and false"),
        ({"use_dora": True}, r"use_dora = true: DoRA"),
        ({"drop": "E"}, r"safetensors: base_model.model.x.lora_A: x has no lora_E"),
        ({"drop": "A"}, r"x has no lora_A"),
    ],
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoremergeError, match=message) as refused:
        load(by_hand(tmp_path / "a", **settings))
    assert refused.value.remedy


def test_shapes_that_do_not_multiply(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.x.lora_A": torch.ones(2, 4),
        "base_model.model.x.lora_B": torch.ones(3, 2),
        "base_model.model.x.lora_E": torch.ones(2),
    }
    with pytest.raises(TensorError, match=r"x\.lora_B: A \[2, 4\], B \[3, 2\] and E \[2\] do not multiply"):
        load(zoo.by_hand(tmp_path / "a", tensors, peft_type="ADALORA", init_r=2))
    folder = zoo.by_hand(tmp_path / "b", {"base_model.model.lm_head.weight": torch.ones(2)}, peft_type="ADALORA")
    with pytest.raises(TensorError, match="no ADALORA module"):
        load(folder)


def test_a_lora_file_under_an_adalora_config(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="has no lora_E"):
        load(zoo.simple(tmp_path / "a", peft_type="ADALORA", init_r=2))
