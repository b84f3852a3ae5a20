"""VeRA and PVeRA: ΔW = diag(λ_b) B[:out] · diag(λ_d) A[:, :in], with A and B shared by all modules of an adapter.

PVeRA stores a mean and a variance; its update is that of the means, the first halves of A and λ_d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Module
from coremerge.errors import ConfigError, TensorError
from coremerge.formats.base_model import InputWidths
from coremerge.formats.checkpoint import Checkpoint, Keys, extras, info, no_modules, sort_keys
from coremerge.formats.safetensors_file import dtype_of, joint_dtype, read_factor
from coremerge.lowrank import LowRank

TYPES = ("VERA", "PVERA")

LARGEST_MADE = 2**30
"""Entries of an A and a B that are not in the file: 4 GB, ten times those of the widest models at rank 1,024."""


def read(checkpoint: Checkpoint) -> Adapter:
    """A VeRA or PVeRA as an adapter of rank r; A and B are read, or made anew from the config's key, once.

    Raises:
        ConfigError: widths that the files do not tell, or a config that contradicts the file.
        TensorError: tensors that are missing, misshapen, stray or not finite.
    """
    stem = checkpoint.config.type.lower()
    keys = sort_keys(checkpoint, (f"{stem}_lambda_b", f"{stem}_lambda_d"), (f"{stem}_A", f"{stem}_B"))
    if not keys.parts:
        raise no_modules(checkpoint)
    lambdas = {name: _lambdas(checkpoint, stem, name, parts) for name, parts in keys.parts.items()}
    rank = _rank(checkpoint, lambdas, halves=2 if stem == "pvera" else 1)
    outs = {name: pair.out for name, pair in lambdas.items()}
    widths = InputWidths(checkpoint.config, checkpoint.options, outs)
    shared = _Shared(checkpoint, keys, rank, max(outs.values()), widths)
    modules = {
        name: Module((pair.out, widths.of(name, shared.width)), rank, dtype=pair.dtype)
        for name, pair in lambdas.items()
    }

    def load(name: str) -> LowRank:
        out, width = modules[name].shape
        b, d = (read_factor(checkpoint.tensors, key) for key in (lambdas[name].b, lambdas[name].d))
        left = b.unsqueeze(1) * shared.b[:out].to(torch.float64)
        return LowRank(left, d[:rank].unsqueeze(1) * shared.a[:rank, :width].to(torch.float64))

    notes = (*shared.notes, *widths.notes, *_unused(checkpoint))
    return Adapter(
        modules,
        load,
        name=checkpoint.location.name,
        extras=extras(checkpoint, keys),
        info=info(checkpoint, keys, notes),
    )


def _unused(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    notes = ["lora_alpha is in the config, and VeRA has no scale: not used"] if config.given("lora_alpha") else []
    if config.flag("sample_at_inference"):
        notes.append("it samples at inference: its mean is taken")
    return notes


@dataclass(frozen=True)
class _Lambdas:
    b: str
    d: str
    out: int
    inner: int
    dtype: torch.dtype


def _lambdas(checkpoint: Checkpoint, stem: str, name: str, parts: Mapping[str, str]) -> _Lambdas:
    tensors = checkpoint.tensors
    for letter in "bd":
        if f"{stem}_lambda_{letter}" not in parts:
            raise TensorError(
                f"{name} has no {stem}_lambda_{letter}", file=tensors.path, key=next(iter(parts.values())),
                remedy="Download or save the adapter again",
            )  # fmt: skip
    b, d = parts[f"{stem}_lambda_b"], parts[f"{stem}_lambda_d"]
    for key in (b, d):
        shape = tensors.entries[key].shape
        if len(shape) != 1 or not shape[0]:
            raise TensorError(f"shape {list(shape)} is not that of a vector", file=tensors.path, key=key)
    dtype = joint_dtype(tensors, b, d)
    return _Lambdas(b, d, tensors.entries[b].shape[0], tensors.entries[d].shape[0], dtype)


def _rank(checkpoint: Checkpoint, lambdas: Mapping[str, _Lambdas], halves: int) -> int:
    config = checkpoint.config
    said = config.integer("r", 256)
    for name, pair in lambdas.items():
        if pair.inner != said * halves:
            raise ConfigError(
                f"{name} has a λ_d of {pair.inner} values in the file, and the config says {said * halves}",
                file=config.path, key="r", value=config.raw.get("r", said),
                remedy="Restore the config saved with this file",
            )  # fmt: skip
    return said


class _Shared:
    """A (r, widest input) and B (widest output, r): as saved, or as PEFT makes them from the key."""

    def __init__(self, checkpoint: Checkpoint, keys: Keys, rank: int, widest_out: int, widths: InputWidths) -> None:
        stem = checkpoint.config.type.lower()
        self._tensors = checkpoint.tensors
        self._a, self._b = keys.shared.get(f"{stem}_A"), keys.shared.get(f"{stem}_B")
        self._rows = rank * (2 if stem == "pvera" else 1)
        self._rank = rank
        self._out = widest_out
        self.notes: list[str] = []
        if (self._a is None) != (self._b is None):
            raise TensorError(
                f"only one of {stem}_A and {stem}_B is in the file", file=self._tensors.path, key=self._a or self._b,
                remedy="Save the adapter again with save_projection=True",
            )  # fmt: skip
        if self._a and self._b:
            self.width = self._saved_width(self._a, self._b)
        else:
            self.width = widths.widest()
            self._key = _seed(checkpoint)
            self._check_size()
            self.notes.append(
                f"A and B are not in the file: made anew from projection_prng_key {self._key}, {self.width} wide"
            )

    def _check_size(self) -> None:
        if self._rows * self.width + self._out * self._rank > LARGEST_MADE:
            raise ConfigError(
                f"A and B are not in the file, and at rank {self._rank} for {self.width} inputs they are too large to"
                " be made anew",
                file=self._tensors.path, key="save_projection",
                remedy="Check the base model's config (or vera_width), or save the adapter with save_projection=True",
            )  # fmt: skip

    def _saved_width(self, a: str, b: str) -> int:
        shape_a, shape_b = self._tensors.entries[a].shape, self._tensors.entries[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != self._rows or shape_b[1] != self._rank:
            raise TensorError(
                f"A {list(shape_a)} and B {list(shape_b)} do not fit rank {self._rank}", file=self._tensors.path, key=a
            )
        if shape_b[0] < self._out:
            raise TensorError(
                f"B has {shape_b[0]} rows, and a module has {self._out} outputs", file=self._tensors.path, key=b
            )
        dtype_of(self._tensors, a), dtype_of(self._tensors, b)
        return shape_a[1]

    @property
    def a(self) -> Tensor:
        """A."""
        return self._both[0]

    @property
    def b(self) -> Tensor:
        """B."""
        return self._both[1]

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        if self._a and self._b:
            return self._saved(self._a), self._saved(self._b)
        # PEFT's order: A then B from one CPU generator, in float32
        generator = torch.Generator(device="cpu").manual_seed(self._key)
        return _kaiming((self._rows, self.width), generator), _kaiming((self._out, self._rank), generator)

    def _saved(self, key: str) -> Tensor:
        return read_factor(self._tensors, key).to(dtype_of(self._tensors, key))


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with fan-in and gain √2 (``peft.tuners.vera.model._kaiming_init``)."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _seed(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    key = config.raw.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int) or not -(2**63) <= key < 2**64:
        raise config.wrong(
            "projection_prng_key",
            "must be a whole number: it makes the A and B that are not in this file",
            "Save the adapter again with save_projection=True",
        )
    if config.type == "VERA" and config.given("lora_alpha") and "projection_prng_key" not in config.raw:
        raise config.wrong(
            "projection_prng_key",
            "missing: this config is not PEFT's, so how its A and B were made is not known",
            "Save the adapter with its projections (vera_A and vera_B)",
        )
    return key
