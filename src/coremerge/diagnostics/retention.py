"""What a merged adapter keeps of each of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coremerge.diagnostics.alignment import _cores
from coremerge.lowrank import LowRank


@dataclass(frozen=True)
class Retention:
    """What a merge keeps of one input.

    Attributes:
        energy: share of the input's squared norm that lies in the row and column spaces of the merged updates: 1 where
            nothing was cut.
        cosine: between the input and the merged update.
        projection: ⟨Δ_t, Δ⟩ / ‖Δ_t‖²: how much of the input, in its own direction, the merged update has.
    """

    energy: float
    cosine: float
    projection: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


@dataclass(frozen=True)
class Sums:
    """The squared norms and inner products of one module that :class:`Retention` adds up."""

    kept: float
    inner: float
    own: float
    merged: float


def retain(merged: Mapping[str, LowRank], adapters: Mapping[str, Mapping[str, LowRank]]) -> dict[str, Retention]:
    """What ``merged`` (module name → update) keeps of each of ``adapters``, all modules together."""
    return {name: _retention(merged, adapter) for name, adapter in adapters.items()}


def _retention(merged: Mapping[str, LowRank], adapter: Mapping[str, LowRank]) -> Retention:
    parts = [
        retain_module(merged[name] if name in merged else LowRank.zeros(*update.shape), update)
        for name, update in adapter.items()
    ]
    kept, inner, own, whole = (sum(getattr(part, key) for part in parts) for key in ("kept", "inner", "own", "merged"))
    if own == 0:
        return Retention(1.0, 0.0, 0.0)
    return Retention(kept / own, inner / (own * whole) ** 0.5 if whole else 0.0, inner / own)


def retain_module(merged: LowRank, update: LowRank) -> Sums:
    """The sums of one module, computed on cores."""
    whole, own = _cores([merged, update])
    svd = whole.svd.cut()
    kept = LowRank(svd.left.mT @ own.left, own.right @ svd.right.mT)
    return Sums(float(kept.norm() ** 2), float(own.inner(whole)), float(own.norm() ** 2), float(whole.norm() ** 2))
