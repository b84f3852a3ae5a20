"""Adapter folders small enough to be made on the fly, by hand: what PEFT would write for a two-layer model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, NARROW = 24, 12
PREFIX = "base_model.model."


def modules(layers: int = 2, parts: Sequence[str] = ("q_proj", "v_proj")) -> dict[str, tuple[int, int]]:
    """Module name → (out, in)."""
    return {
        f"model.layers.{layer}.self_attn.{part}": (NARROW if part == "v_proj" else WIDTH, WIDTH)
        for layer in range(layers)
        for part in parts
    }


def make_adapter(
    folder: Path,
    r: int = 4,
    alpha: float = 8,
    *,
    seed: int = 0,
    layers: int = 2,
    parts: Sequence[str] = ("q_proj", "v_proj"),
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA adapter with random factors into ``folder``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {PREFIX + name: tensor for name, tensor in (extra or {}).items()}
    for name, (out, inner) in modules(layers, parts).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, inner, generator=generator).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, r, generator=generator).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(parts),
        "base_model_name_or_path": "org/tiny",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def make_base(folder: Path, layers: int = 2) -> Path:
    """Write a base model's safetensors for the same modules into ``folder``."""
    generator = torch.Generator().manual_seed(99)
    tensors = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in modules(layers).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 24}', encoding="utf-8")
    return folder
