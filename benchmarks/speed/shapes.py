"""Adapters of the shapes of known models, made at random: ``python -m benchmarks.speed.shapes llama-3-8b FOLDER``.

Spectra decay: component i of an update is of size 1/i, in its left factor (a trained B decays, a trained A hardly
does), and the adapters of a set share a part, as adapters of one base do. Tensors are made and written one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from coremerge.executors.local import single_threaded_torch

SHARED = 0.3
"""Size of the part that the adapters of one set have in common."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The adapted modules of a model, and how many adapters of which rank to make for it.

    Attributes:
        layer: a module's name, with ``{layer}`` and ``{module}``.
        modules: name within a layer → (out, in).
    """

    name: str
    layers: int
    layer: str
    modules: dict[str, tuple[int, int]]
    adapters: int
    rank: int = 16
    dtype: str = "BF16"
    seed: int = 0

    def shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(module name, (out, in)) of the whole model."""
        for layer in range(self.layers):
            for module, size in self.modules.items():
                yield self.layer.format(layer=layer, module=module), size

    @property
    def parameters(self) -> int:
        """Of one adapter."""
        return self.rank * sum(m + n for _, (m, n) in self.shapes())

    @property
    def key(self) -> str:
        """A folder name that changes with anything that changes the files."""
        text = json.dumps([asdict(self), SHARED], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _attention(width: int, narrow: int) -> dict[str, tuple[int, int]]:
    sizes = {"q_proj": (width, width), "k_proj": (narrow, width), "v_proj": (narrow, width), "o_proj": (width, width)}
    return {f"self_attn.{name}": size for name, size in sizes.items()}


_MLP_70B = {"mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192), "mlp.down_proj": (8192, 28672)}
_MLP_405B = {"mlp.gate_proj": (53248, 16384), "mlp.up_proj": (53248, 16384), "mlp.down_proj": (16384, 53248)}
_EXPERT = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
_EXPERTS = {f"mlp.experts.{i}.{name}": size for i in range(64) for name, size in _EXPERT.items()}
_VIT = [f"attention.attention.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, "model.layers.{layer}.{module}", _attention(64, 16), adapters=3, rank=4),
        Shape("vit-b", 12, "vit.encoder.layer.{layer}.{module}", dict.fromkeys(_VIT, (768, 768)), adapters=8),
        Shape("llama-3-8b", 32, "model.layers.{layer}.{module}", _attention(4096, 1024), adapters=6),
        Shape("llama-70b", 80, "model.layers.{layer}.{module}", _attention(8192, 1024) | _MLP_70B, adapters=8),
        Shape("llama-405b", 126, "model.layers.{layer}.{module}", _attention(16384, 1024) | _MLP_405B, adapters=4),
        Shape("experts", 1, "model.layers.{layer}.{module}", _EXPERTS, adapters=4, rank=8),
    )
}
"""The sets by name; :func:`dataclasses.replace` makes others of them."""


def factors(shape: Shape, size: tuple[int, int], adapter: int, place: int) -> tuple[Tensor, Tensor]:
    """lora_A (r, n) and lora_B (m, r) of one module: a function of the seed, the adapter and the module's place."""
    m, n = size
    own = _gaussian(shape, (m + n, shape.rank), adapter, place)
    common = _gaussian(shape, (m + n, shape.rank), -1, place)
    stacked = (own + SHARED * common) / (1 + SHARED**2) ** 0.5
    decay = 1 / torch.arange(1, shape.rank + 1)
    return (stacked[m:] / n**0.5).mT.contiguous(), stacked[:m] * decay / m**0.5


def _gaussian(shape: Shape, size: tuple[int, int], adapter: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape.seed * 1_000_003 + (adapter + 1) * 10_007 + place)
    return torch.randn(size, generator=generator)


def make(shape: Shape, work: Path) -> list[Path]:
    """The set's adapter folders under ``work``; made only if they are not there."""
    folders = [work / shape.key / f"adapter{i}" for i in range(shape.adapters)]
    with single_threaded_torch():  # many small tensors: threads would only wait for each other
        for i, folder in enumerate(folders):
            if not (folder / "adapter_config.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                _write_tensors(folder / "adapter_model.safetensors", shape, i)
                (folder / "adapter_config.json").write_text(json.dumps(_config(shape), indent=2))
    return folders


def _config(shape: Shape) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": shape.name,
        "r": shape.rank,
        "lora_alpha": shape.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shape.modules}),
        "task_type": None,
    }


def _write_tensors(path: Path, shape: Shape, adapter: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    dtype, place = _DTYPES[shape.dtype], 0
    for name, (m, n) in shape.shapes():
        for key, size in (("lora_A", (shape.rank, n)), ("lora_B", (m, shape.rank))):
            end = place + size[0] * size[1] * dtype.itemsize
            header[f"base_model.model.{name}.{key}.weight"] = {
                "dtype": shape.dtype,
                "shape": size,
                "data_offsets": [place, end],
            }
            place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (_, size) in enumerate(shape.shapes()):
            for factor in factors(shape, size, adapter, i):
                file.write(factor.to(dtype).contiguous().view(torch.uint8).numpy().data)


def files(folders: list[Path]) -> list[Path]:
    """The tensor files of adapter folders."""
    return [folder / "adapter_model.safetensors" for folder in folders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--rank", type=int)
    given = parser.parse_args()
    changes = {key: value for key, value in vars(given).items() if key in ("adapters", "rank") and value}
    for folder in make(replace(SHAPES[given.shape], **changes), given.work):
        print(folder)


if __name__ == "__main__":
    main()
