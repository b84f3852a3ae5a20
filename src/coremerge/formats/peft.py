"""PEFT's LoRA: ΔW = s · B A, with s = alpha / r, or alpha / √r under rsLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coremerge.adapter import Adapter, Kind, Lazy, Module
from coremerge.errors import ConfigError, MismatchError, TensorError, UnsupportedError
from coremerge.formats.base_model import sliced
from coremerge.formats.checkpoint import Checkpoint, Keys, extras, info, no_modules, sort_keys, with_note
from coremerge.formats.config import Config, as_integer, as_number, refuse_variants
from coremerge.formats.patterns import Patterns
from coremerge.formats.safetensors_file import Tensors, dtype_of, joint_dtype, read_factor, read_pair
from coremerge.lowrank import LowRank
from coremerge.rounding import stored_rounding

TYPES = ("LORA",)
PARTS = (
    "lora_A",
    "lora_B",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_diag",
)
_KINDS: dict[int, Kind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class Factors:
    """Where one module's update is stored: its keys, and what is known of it without reading them."""

    left: str
    right: str
    module: Module


def read(checkpoint: Checkpoint) -> Adapter:
    """A PEFT LoRA as an adapter; factors are read when asked for.

    Raises:
        ConfigError: a config that contradicts the file.
        TensorError: tensors that are missing, misshapen, stray or not finite.
        UnsupportedError: a variant whose update is not s · B A.
    """
    refuse_variants(checkpoint.config)
    keys = sort_keys(checkpoint, PARTS)
    if not keys.parts:
        raise no_modules(checkpoint)
    scales = Scales(checkpoint.config)
    found = {name: _factors(checkpoint, name, parts, scales) for name, parts in keys.parts.items()}
    return build(checkpoint, keys, found, _biases(checkpoint.tensors, keys, found))


def build(checkpoint: Checkpoint, keys: Keys, found: Mapping[str, Factors], biases: Mapping[str, Tensor]) -> Adapter:
    """The lazy adapter over ``found``."""
    tensors = checkpoint.tensors

    def read(name: str, dtype: torch.dtype | None = torch.float64) -> LowRank:
        factors = found[name]
        kind = dtype or factors.module.exact_dtype
        left, right = (x.flatten(1) for x in read_pair(tensors, (factors.left, factors.right), kind))
        scale, rounding = factors.module.scale, stored_rounding(left, right, factors.module.dtype)
        return LowRank(left if scale == 1 else left.mul_(scale), right, rounding)

    return Adapter(
        {name: factors.module for name, factors in found.items()},
        read,
        read=read,
        name=checkpoint.location.name,
        biases=biases,
        extras=extras(checkpoint, keys),
        info=info(checkpoint, keys, warnings=sliced({name: factors.module.shape for name, factors in found.items()})),
    )


class Scales:
    """Each module's scale by PEFT's rules, once its rank agrees with the config."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rank = config.integer("r", 8)
        self._alpha = config.number("lora_alpha", 8.0)
        self._ranks: Patterns[int] = Patterns(config, "rank_pattern", as_integer)
        self._alphas: Patterns[float] = Patterns(config, "alpha_pattern", as_number)
        self._rooted = config.flag("use_rslora")

    def said(self, module: str) -> int:
        """The rank that the config gives ``module``."""
        return self._ranks.get(_layer(module), self._rank)

    def of(self, module: str, rank: int) -> float:
        """The scale of ``module``, whose lora_A has ``rank`` rows.

        Raises:
            ConfigError: the config says another rank.
        """
        name, said = _layer(module), self.said(module)
        if said != rank:
            key = "r" if said == self._rank else "rank_pattern"
            raise ConfigError(
                f"{module} has rank {rank} in the file, and the config says {said}",
                file=self._config.path,
                key=key,
                value=self._config.raw.get(key, said),
                remedy="The config belongs to another checkpoint, or lost its rank_pattern: restore it",
            )
        return self._alphas.get(name, self._alpha) / (math.sqrt(rank) if self._rooted else rank)


def _layer(module: str) -> str:
    """PEFT names both parts of an attention layer by the layer itself."""
    return module.partition(".base_layer.")[0]


def _factors(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], scales: Scales) -> Factors:
    tensors = checkpoint.tensors
    _refuse_other_parts(tensors, parts)
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    stem = "lora_embedding_" if embedding else "lora_"
    right, left = (_part(tensors, name, parts, stem + letter) for letter in "AB")
    odd = parts.keys() - {stem + "A", stem + "B", "lora_B.bias"}
    if odd:
        raise TensorError(f"{name} is both a linear layer and an embedding", file=tensors.path, key=parts[min(odd)])
    a, b = tensors.entries[right].shape, tensors.entries[left].shape
    kind = "embedding" if embedding else _KINDS.get(len(a))
    if kind is None or len(a) != len(b) or (embedding and len(a) != 2) or 0 in (*a, *b):
        raise _misshapen(tensors, left, a, b, scales.said(name))
    if kind.startswith("conv") and b[1] < a[0] and a[0] % max(b[1], 1) == 0:
        raise UnsupportedError(
            f"a convolution in {a[0] // b[1]} groups: its update is not one product",
            file=tensors.path, key=left, value=b, remedy="Leave grouped convolutions out of target_modules",
        )  # fmt: skip
    if a[0] != b[1] or any(side != 1 for side in b[2:]):
        raise _misshapen(tensors, left, a, b, scales.said(name))
    dtype = joint_dtype(tensors, left, right)
    shape = b[0], math.prod(a[1:])
    scale = scales.of(name, a[0])
    return Factors(left, right, Module(shape, a[0], kind, tuple(a[2:]), scale, dtype))


def _refuse_other_parts(tensors: Tensors, parts: Mapping[str, str]) -> None:
    if "lora_magnitude_vector" in parts:
        raise UnsupportedError(
            "DoRA rescales the base weights: the update is not low-rank",
            file=tensors.path, key=parts["lora_magnitude_vector"],
            remedy="Merge it into its base model first, or train without DoRA",
        )  # fmt: skip
    if "lora_diag" in parts:
        raise UnsupportedError(
            "KaSA changes the base model's weights", file=tensors.path, key=parts["lora_diag"],
            remedy="Train without KaSA, or merge it into its base model",
        )  # fmt: skip


def _part(tensors: Tensors, module: str, parts: Mapping[str, str], part: str) -> str:
    if part not in parts:
        there = next(iter(parts.values()))
        raise TensorError(
            f"{module} has no {part}", file=tensors.path, key=there, remedy="Download or save the adapter again"
        )
    return parts[part]


def _misshapen(tensors: Tensors, key: str, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> TensorError:
    """``rank``: the config's. One process of several has some of A's rows or B's columns, of a flat tensor none."""
    cut = min(len(a), len(b)) < 2 or 0 in (*a, *b) or rank in (a[0], b[1]) or a[0] < b[1]
    return TensorError(
        f"A {list(a)} and B {list(b)} do not multiply",
        file=tensors.path,
        key=key,
        remedy="The factors were saved in shards (ZeRO-3 or FSDP): gather them, then save again"
        if cut
        else "Download or save the adapter again",
    )


def _biases(tensors: Tensors, keys: Keys, found: Mapping[str, Factors]) -> Mapping[str, Tensor]:
    stored = {name: parts["lora_B.bias"] for name, parts in keys.parts.items() if "lora_B.bias" in parts}
    for name, key in stored.items():
        shape, out = tensors.entries[key].shape, found[name].module.shape[0]
        if shape != (out,):
            raise TensorError(f"shape {list(shape)}, and the layer has {out} outputs", file=tensors.path, key=key)
        dtype_of(tensors, key)
    return Lazy(tuple(stored), lambda name: read_factor(tensors, stored[name]) * found[name].module.scale)


def relative_to(adapter: Adapter, initial: Adapter) -> Adapter:
    """``adapter`` less the one it was trained from: s·B A − s·B₀A₀, of rank 2r, exactly.

    For PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA, whose files are relative to W₀ − s·B₀A₀.

    Raises:
        MismatchError: the two do not have the same modules of the same shapes.
    """
    file = initial.info.source or initial.name
    odd = sorted(adapter.modules.keys() ^ initial.modules.keys())
    if odd:
        raise MismatchError(
            f"the initial adapter and {adapter.name} have not the same modules", file=file, key=odd[0],
            remedy="Give the adapter as it was saved before this very training",
        )  # fmt: skip
    modules: dict[str, Module] = {}
    for name, module in adapter.modules.items():
        start = initial.modules[name]
        if (start.shape, start.kind, start.kernel) != (module.shape, module.kind, module.kernel):
            raise MismatchError(
                f"initial {start.kind} {start.shape}, trained {module.kind} {module.shape}", file=file, key=name,
                remedy="Give the adapter as it was saved before this very training",
            )  # fmt: skip
        modules[name] = replace(module, rank=module.rank + start.rank, scale=1.0)
    note = f"converted from its initial adapter {file}: rank {adapter_ranks(adapter)} became {adapter_ranks(modules)}"
    return Adapter(
        modules,
        lambda name: adapter[name] - initial[name],
        name=adapter.name,
        biases=adapter.biases,
        extras=adapter.extras,
        info=replace(
            with_note(adapter.info, note),
            initial=initial.info.source or None,
            files=(*adapter.info.files, *initial.info.files),
            stamps={**adapter.info.stamps, **initial.info.stamps},
        ),
    )


def adapter_ranks(modules: Adapter | Mapping[str, Module]) -> str:
    """The ranks that occur, in words."""
    listed = modules.modules if isinstance(modules, Adapter) else modules
    return ", ".join(map(str, sorted({module.rank for module in listed.values()})))
