"""Adapters for tests: made by PEFT on tiny models, or by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

REVISION = "a" * 40


class Zoo(nn.Module):
    """One layer of every type that PEFT's LoRA adapts, each tied to nothing else."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.q_proj = nn.Linear(12, 10)
        self.k_proj = nn.Linear(12, 6, bias=False)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(3)])
        self.c_attn = Conv1D(9, 12)
        self.embed = nn.Embedding(15, 12)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(3, 5, (2, 3))
        self.point = nn.Conv2d(3, 5, 1)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.classifier = nn.Sequential(nn.Linear(10, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Only so that PEFT takes it for a model."""
        return self.classifier(self.q_proj(x))


def quietly(kind: Callable[..., Any], **settings: Any) -> Any:
    """``kind(**settings)`` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**settings)


def randomise(model: nn.Module, *marks: str, seed: int = 0) -> None:
    """Give every parameter whose name has one of ``marks`` normal values (B too)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(mark in name for mark in marks):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapted(config: Any, model: nn.Module | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """``model`` (a :class:`Zoo`) with a PEFT adapter of random values."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model((model if model is not None else Zoo()).to(dtype), config)
        made.to(dtype)
    randomise(made, "lora_", "vera_lambda", "modules_to_save", "trainable_tokens_delta", seed=seed)
    return made


def save(model: Any, folder: Path, **options: Any) -> Path:
    """``model`` saved by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def delta(model: Any, module: str) -> Tensor:
    """PEFT's own update of one module, as (out, in · kernel), in float64."""
    layer = model.base_model.model.get_submodule(module)
    weight = layer.get_delta_weight("default").detach().double()
    if type(layer).__name__ == "Embedding" or getattr(layer, "fan_in_fan_out", False):
        weight = weight.T
    return weight.flatten(1)


def by_hand(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter folder with just these keys and tensors; ``peft_type`` is LORA unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def lora(
    *modules: str, rank: int = 2, shape: tuple[int, int] = (5, 4), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Plain LoRA tensors under PEFT's key names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            made[f"base_model.model.{module}.lora_{part}.weight"] = torch.randn(size, generator=generator).to(dtype)
    return made


def simple(
    folder: Path, *, rank: int = 2, change: Callable[[dict[str, Tensor]], None] | None = None, **config: Any
) -> Path:
    """A two-module LoRA by hand; ``change`` may edit its tensors, and ``config`` its config."""
    tensors = lora("layers.0.q_proj", "layers.0.v_proj", rank=rank)
    if change:
        change(tensors)
    return by_hand(folder, tensors, **{"r": rank, "lora_alpha": 4, **config})


class Decoder(nn.Module):
    """Two layers with the paths of a causal language model, one of whose modules is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"q_proj": nn.Linear(4, 5), "module": nn.Linear(4, 5)}) for _ in range(2)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.score = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Only so that PEFT takes it for a model."""
        result: Tensor = self.score(x)
        return result


def loaded(folder: Path, model: nn.Module) -> Any:
    """``model`` with the adapter in ``folder``, as PEFT loads it: every key is in its place, and no B is zero."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        made = peft.PeftModel.from_pretrained(model, folder)
    bs = [parameter for name, parameter in made.named_parameters() if "lora_B" in name]
    assert bs and all(parameter.any() for parameter in bs)
    return made


def hub_cache(root: Path, repo: str, files: Mapping[str, Path], *, ref: str = "main", commit: str = REVISION) -> Path:
    """A hub cache folder that holds ``files`` (path in the repository → file to copy) of one repository."""
    place = root / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    (place / "blobs").mkdir(exist_ok=True)
    for name, file in files.items():
        target = place / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return root
