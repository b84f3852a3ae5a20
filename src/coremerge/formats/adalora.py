"""AdaLoRA: ΔW = s · B (E ⊙ A), with s = alpha / (init_r + 1e-5), as PEFT computes it (``AdaLoraLayer``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coremerge.adapter import Adapter, Module
from coremerge.errors import ConfigError, TensorError
from coremerge.formats.checkpoint import Checkpoint, extras, info, no_modules, sort_keys
from coremerge.formats.config import Config, refuse_variants
from coremerge.formats.safetensors_file import dtype_of, joint_dtype, read_factor
from coremerge.lowrank import LowRank

TYPES = ("ADALORA",)
PARTS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True)
class _Triple:
    a: str
    b: str
    e: str
    module: Module


def read(checkpoint: Checkpoint) -> Adapter:
    """An AdaLoRA, pruned or not, as an adapter.

    ``rank_pattern`` holds a list of booleans per module: the ranks kept, which the file's tensors already are.

    Raises:
        ConfigError: a config that contradicts the file.
        TensorError: tensors that are missing, misshapen, stray or not finite.
        UnsupportedError: a setting that AdaLoRA does not have.
    """
    refuse_variants(checkpoint.config)
    keys = sort_keys(checkpoint, PARTS)
    if not keys.parts:
        raise no_modules(checkpoint)
    config, tensors = checkpoint.config, checkpoint.tensors
    kept = _kept(config)
    found = {name: _triple(checkpoint, name, parts, kept) for name, parts in keys.parts.items()}

    def load(name: str) -> LowRank:
        triple = found[name]
        a, b, e = (read_factor(tensors, key) for key in (triple.a, triple.b, triple.e))
        return LowRank(b * triple.module.scale, e * a)

    return Adapter(
        {name: triple.module for name, triple in found.items()},
        load,
        name=checkpoint.location.name,
        extras=extras(checkpoint, keys),
        info=info(checkpoint, keys),
    )


def _kept(config: Config) -> Mapping[str, int]:
    """Module → rank after pruning, from ``rank_pattern``."""
    kept = {}
    for key, mask in config.table("rank_pattern").items():
        if not isinstance(mask, list) or not all(isinstance(bit, bool) for bit in mask):
            raise ConfigError(
                "must be a list of true and false, one per initial rank",
                file=config.path, key=f"rank_pattern.{key}", value=mask, remedy="Save the adapter again with PEFT",
            )  # fmt: skip
        kept[key.rpartition(".lora_E")[0] or key] = sum(mask)
    return kept


def _triple(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], kept: Mapping[str, int]) -> _Triple:
    tensors, config = checkpoint.tensors, checkpoint.config
    for part in PARTS:
        if part not in parts:
            raise TensorError(
                f"{name} has no {part}", file=tensors.path, key=next(iter(parts.values())),
                remedy="Download or save the adapter again",
            )  # fmt: skip
    a, b, e = (tensors.entries[parts[part]].shape for part in PARTS)
    if len(a) != 2 or len(b) != 2 or e != (a[0], 1) or b[1] != a[0]:
        raise TensorError(
            f"A {list(a)}, B {list(b)} and E {list(e)} do not multiply", file=tensors.path, key=parts["lora_B"],
            remedy="Download or save the adapter again",
        )  # fmt: skip
    initial = config.integer("init_r", 12)
    said = kept.get(name, initial)
    if said != a[0]:
        key = "rank_pattern" if name in kept else "init_r"
        raise ConfigError(
            f"{name} has rank {a[0]} in the file, and the config says {said}",
            file=config.path,
            key=key,
            value=config.raw.get(key, said),
            remedy="Restore the config saved with this file",
        )
    alpha = config.number("lora_alpha", 8.0)
    scale = (alpha if alpha > 0 else float(a[0])) / (initial + 1e-5)  # PEFT: the rank, once pruned
    dtype = joint_dtype(tensors, parts["lora_A"], parts["lora_B"])
    dtype_of(tensors, parts["lora_E"])
    return _Triple(
        parts["lora_A"], parts["lora_B"], parts["lora_E"], Module((b[0], a[1]), a[0], scale=scale, dtype=dtype)
    )
