"""PEFT's own merging on a stand-in for the base model: few layers of the true widths, weights all zero."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks.speed.shapes import Shape, files


def base_model(shape: Shape) -> nn.Module:
    """Nothing but the linear layers that ``shape`` names."""
    root = nn.Module()
    for name, (m, n) in shape.shapes():
        *parents, last = name.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        linear = nn.Linear(n, m, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(linear.weight)
        holder.add_module(last, linear)
    return root


def seconds(shape: Shape, folders: list[Path], combination: Literal["svd", "cat"]) -> float:
    """Time of one ``add_weighted_adapter`` over the layers of ``shape``, its adapters already loaded."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import safe_open

    targets = sorted({module.rsplit(".", 1)[-1] for module in shape.modules})
    config = LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=targets)
    model = get_peft_model(base_model(shape), config, adapter_name="t0")
    names = [name for name, _ in shape.shapes()]
    for i, path in enumerate(files(folders)):
        if i:
            model.add_adapter(f"t{i}", config)
        with safe_open(path, framework="pt") as file:
            wanted = [f"base_model.model.{name}.lora_{x}.weight" for name in names for x in "AB"]
            set_peft_model_state_dict(model, {key: file.get_tensor(key) for key in wanted}, adapter_name=f"t{i}")
    adapters = [f"t{i}" for i in range(len(folders))]
    start = time.perf_counter()
    model.add_weighted_adapter(
        adapters, [1.0] * len(adapters), "merged", combination_type=combination, svd_rank=shape.rank
    )
    return time.perf_counter() - start
