"""A model with one layer of every kind that PEFT's LoRA knows, and adapters for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coremerge.adapter import Adapter, Info, Module
from coremerge.lowrank import LowRank

KINDS = {
    "block.linear": Module((5, 6), 2),
    "block.embed": Module((4, 9), 3, "embedding"),
    "conv1": Module((4, 6), 1, "conv1d", (3,)),
    "conv2": Module((4, 12), 2, "conv2d", (2, 3)),
    "conv3": Module((3, 16), 2, "conv3d", (2, 2, 2)),
}
INPUTS = {
    "block.linear": lambda: torch.randn(7, 6),
    "block.embed": lambda: torch.arange(9),
    "conv1": lambda: torch.randn(2, 2, 8),
    "conv2": lambda: torch.randn(2, 2, 5, 6),
    "conv3": lambda: torch.randn(2, 2, 4, 3, 3),
    "gpt": lambda: torch.randn(7, 6),
    "head": lambda: torch.randn(7, 5),
}


class Net(nn.Module):
    """One layer of every kind; called by name."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"linear": nn.Linear(6, 5), "embed": nn.Embedding(9, 4), "other": nn.Linear(6, 5)})
        self.conv1 = nn.Conv1d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 4, (2, 3), stride=(2, 1))
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.gpt = Conv1D(5, 6)
        self.head = nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, layer: str, x: Tensor) -> Tensor:
        """One layer's output."""
        result: Tensor = self.get_submodule(layer)(x)
        return result


def update(module: Module, seed: int = 0) -> LowRank:
    """A random update for ``module``."""
    generator = torch.Generator().manual_seed(seed)
    (out, inner), rank = module.shape, module.rank
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, inner, generator=generator, dtype=torch.float64))


def adapter(kinds: Mapping[str, Module] = KINDS, *, dtype: torch.dtype = torch.float32, **rest: Any) -> Adapter:
    """Random updates for ``kinds``, said to be of ``dtype``."""
    held = {name: update(module, seed) for seed, (name, module) in enumerate(sorted(kinds.items()))}
    modules = {name: replace(module, dtype=dtype) for name, module in kinds.items()}
    return Adapter(modules, held.__getitem__, **{"info": Info(), **rest})


def changed(net: nn.Module, made: Adapter) -> Net:
    """A copy of ``net`` with the dense updates (and biases) of ``made`` added to its weights."""
    result = Net(next(net.parameters()).dtype)
    result.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, module in made.modules.items():
            layer = result.get_submodule(name)
            dense = made[name].dense()
            if module.kind == "embedding" or isinstance(layer, Conv1D):
                dense = dense.mT
            layer.weight += dense.reshape(layer.weight.shape)
            if name in made.biases:
                layer.bias += made.biases[name]
    return result


def stacked(layers: int = 2, width: int = 6, rank: int = 2) -> Adapter:
    """Query and value updates of a little stack of layers."""
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(layers) for x in "qv"]
    return adapter(dict.fromkeys(names, Module((width, width), rank)))
