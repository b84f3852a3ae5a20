"""Steps around a method. One idea a file.

A :class:`Before` step maps each update to an update; an :class:`After` step maps the merged core to a core, and a
:class:`Beside` step does so by what the inputs are, and where; after :class:`Lift` they map the merged update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coremerge.lowrank import LowRank, Matrix
from coremerge.registry import Registry

if TYPE_CHECKING:
    from coremerge.methods import Site


@dataclass(frozen=True)
class Before:
    """Applied to each update, before it is projected."""

    apply: Callable[[LowRank], LowRank]


@dataclass(frozen=True)
class After:
    """Applied to the merged core, in isometric coordinates."""

    apply: Callable[[Matrix], Matrix]

    def __call__(self, merged: Matrix, cores: Sequence[LowRank], site: Site) -> Matrix:
        """What becomes of ``merged``."""
        return self.apply(merged)


@dataclass(frozen=True)
class Beside:
    """Applied to the merged core likewise, beside the weighted cores that were merged, and where that is."""

    apply: Callable[[Matrix, Sequence[LowRank], Site], Matrix]

    def __call__(self, merged: Matrix, cores: Sequence[LowRank], site: Site) -> Matrix:
        """What becomes of ``merged``."""
        return self.apply(merged, cores, site)


@dataclass(frozen=True)
class Lift:
    """What comes after it is applied in weight space."""


Step = Before | After | Beside | Lift

STEPS: Registry[Step] = Registry("step")

from coremerge.steps import balance, isotropize, lift, lines, soften, star, svc, truncate  # noqa: E402, F401  (each registers itself)
