"""How large numbers are: what float64 cannot be trusted with is refused by name, what float32 cannot is told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coremerge.errors import ConfigError, TensorError
from coremerge.lowrank import LowRank
from coremerge.plan import Plan

MOST = 450
"""Updates and scales between 2^-MOST and 2^MOST have squares and products that float64 holds; others are refused."""

SHORT = 60
"""Matrices with norms between 2^-SHORT and 2^SHORT may be multiplied in float32: no product comes near its ends."""


def check_scales(plan: Plan) -> None:
    """Refuse an alpha of a size at which factors would vanish or overflow while they are read."""
    for key, adapter in plan.adapters.items():
        for name, module in adapter.modules.items():
            if module.scale and abs(math.frexp(module.scale)[1]) > MOST:
                raise ConfigError(
                    f"module {name} counts {module.scale:.3g} times: no update is of such a size",
                    file=adapter.info.source or key, key="lora_alpha", remedy="Check lora_alpha in its config",
                )  # fmt: skip


def sizes_of(cores: Sequence[LowRank]) -> Tensor:
    """(2, T, ...): of both factors of each core the largest entry, as a power of two."""
    sides = [core.left for core in cores], [core.right for core in cores]
    return torch.stack([torch.stack([_octave(x) for x in side]) for side in sides])


def _octave(x: Tensor) -> Tensor:
    return x.abs().amax((-2, -1)).log2() if x.numel() else x.new_full(x.shape[:-2], -math.inf)


def beyond_short(updates: Sequence[LowRank], sizes: Tensor) -> bool:
    """Whether factors that were read in float32 came near its ends, and may have lost something there."""
    odd = ~(sizes.abs() <= SHORT) & (sizes != -math.inf)
    return any(bool(odd[:, i].any()) for i, update in enumerate(updates) if update.dtype == torch.float32)


def check_sizes(names: Sequence[str], sizes: Tensor, plan: Plan) -> None:
    """Refuse updates, as they are or weighted, whose squares float64 does not hold."""
    updates = sizes.sum(0).reshape(len(plan.adapters), len(names)).cpu()
    odd = (updates.isfinite() & (updates.abs() > MOST)).nonzero().tolist()
    for at, i in odd[:1]:
        key, adapter = list(plan.adapters.items())[at]
        raise TensorError(
            f"an update of size {_decimal(updates[at, i])} cannot be computed with", file=adapter.info.source or key,
            key=names[i], remedy="Check lora_alpha in its config, and the values of its factors",
        )  # fmt: skip
    weights = [[plan.weights[key].get(name, 0.0) for name in names] for key in plan.adapters]
    weighted = (updates + torch.tensor(weights, dtype=torch.float64).abs().log2()).amax(0)
    for i in (weighted.isfinite() & (weighted.abs() > MOST)).nonzero().flatten().tolist()[:1]:
        raise ConfigError(
            f"module {names[i]} becomes one of size {_decimal(weighted[i])}, which cannot be computed with",
            key="weights", remedy="Give weights nearer to 1",
        )  # fmt: skip


def _decimal(octave: Tensor) -> str:
    return f"1e{float(octave) * math.log10(2):+.0f}"


def check_finite(names: Sequence[str], plan: Plan) -> None:
    """Refuse updates with values that are NaN or infinite."""
    for key, adapter in plan.adapters.items():
        for name in adapter.keys() & set(names):
            update = adapter[name]
            if not bool(update.left.isfinite().all() & update.right.isfinite().all()):
                raise TensorError(
                    f"module {name} has NaN or infinite values", file=adapter.info.source or key,
                    remedy="Check its factors, and lora_alpha in its config",
                )  # fmt: skip
