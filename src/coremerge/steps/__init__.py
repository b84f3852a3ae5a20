"""Steps around a method. One idea a file.

A :class:`Before` step maps each update to an update; an :class:`After` step maps the merged core to a core, or after
:class:`Lift` the merged update to an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coremerge.lowrank import LowRank, Matrix
from coremerge.registry import Registry


@dataclass(frozen=True)
class Before:
    """Applied to each update, before it is projected."""

    apply: Callable[[LowRank], LowRank]


@dataclass(frozen=True)
class After:
    """Applied to the merged core, in isometric coordinates."""

    apply: Callable[[Matrix], Matrix]


@dataclass(frozen=True)
class Lift:
    """What comes after it is applied in weight space."""


Step = Before | After | Lift

STEPS: Registry[Step] = Registry("step")

from coremerge.steps import balance, isotropize, lift, soften, star, truncate  # noqa: E402, F401  (each registers itself)
