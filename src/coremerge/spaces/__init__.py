"""Spaces: coordinates in which the updates of one module are merged.

Every space is lossless and isometric: ``lift`` undoes ``project``, and norms, inner products and singular values of the
cores are those of the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coremerge.lowrank import LowRank, total
from coremerge.registry import Registry


@dataclass(frozen=True)
class Lift:
    """The way from a core back to weight space: small matrices only, so that it can be kept while updates are read again.

    Attributes:
        left: (..., R, p): the result's left factor is [left_1 … left_T] · left · core.left; None: core.left itself.
        right: (..., q, R): its right factor is core.right · right · [right_1; …; right_T]; None: core.right itself.
        balanced: the stacked factors are those of the balanced updates.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    balanced: bool = False

    def __call__(self, core: LowRank, updates: Sequence[LowRank]) -> LowRank:
        """``core`` (..., p, q) in weight space (..., m, n); ``updates`` are those that were projected."""
        left, right = core.left, core.right
        if self.left is None and self.right is None:
            return core
        stack = total([u.balanced() for u in updates] if self.balanced else updates)
        if self.left is not None:
            left = stack.left @ (self.left.to(left.device) @ left)
        if self.right is not None:
            right = (right @ self.right.to(right.device)) @ stack.right
        return LowRank(left, right)

    def map(self, change: Callable[[Tensor], Tensor]) -> Lift:
        """The same with ``change`` applied to its matrices: one element of a batch, another device."""
        left, right = (None if x is None else change(x) for x in (self.left, self.right))
        return Lift(left, right, self.balanced)


@dataclass(frozen=True)
class Coordinates:
    """The updates of one module in a space.

    Attributes:
        cores: one per update, all of one shape (..., p, q).
        lift: the way back.
        rows: row scales (..., p) by which a method's inputs are divided and its output multiplied, or None.
    """

    cores: tuple[LowRank, ...]
    lift: Lift
    rows: Tensor | None = None


Space = Callable[[Sequence[LowRank]], Coordinates]
"""``project``: the updates of one module (each (..., m, r_t) by (..., r_t, n)) → :class:`Coordinates`."""

SPACES: Registry[Space] = Registry("space")

from coremerge.spaces import core, full, knots  # noqa: E402, F401  (each registers itself)
