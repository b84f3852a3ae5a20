"""Spaces: coordinates in which the updates of one module are merged.

Every space is isometric: norms, inner products and singular values of cores are those of what ``lift`` makes of them.
``lift`` undoes ``project``, but for a space that declares what it ``keeps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.registry import Registry


@dataclass(frozen=True)
class Lift:
    """The way from a core back to weight space, in small matrices.

    Attributes:
        left: (..., R, p): the result's left factor is [left_1 … left_T] · left · core.left; None: core.left itself.
        right: (..., q, R): its right factor is core.right · right · [right_1; …; right_T]; None: core.right itself.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def fold(self, core: LowRank) -> Combination:  # noqa: F811
        """The way that ``core`` (..., p, q) goes: all that has to be kept of a merged module."""
        left = core.left if self.left is None else self.left @ core.left
        right = core.right if self.right is None else core.right @ self.right
        return Combination(left, right, self.left is not None, self.right is not None)

    def __call__(self, core: LowRank, updates: Sequence[LowRank]) -> LowRank:  # noqa: F811
        """``core`` (..., p, q) in weight space (..., m, n); ``updates`` are those that were projected."""
        return self.fold(core)(updates)


@dataclass(frozen=True)
class Combination:
    """A merged update of rank k as combinations of the columns and rows of the updates' factors.

    Attributes:
        left: (..., R, k): the left factor is [left_1 … left_T] · left; unless ``of_left``, (..., m, k) itself.
        right: (..., k, R): the right factor is right · [right_1; …; right_T]; unless ``of_right``, (..., k, n) itself.
    """

    left: Tensor
    right: Tensor
    of_left: bool
    of_right: bool

    def __call__(self, updates: Sequence[LowRank]) -> LowRank:
        """In weight space (..., m, n), in this combination's dtype; ``updates`` are those that were projected."""
        left, right = self.left, self.right
        if self.of_left:
            left = torch.cat([u.left for u in updates], -1).to(left.dtype) @ left
        if self.of_right:
            right = right @ torch.cat([u.right for u in updates], -2).to(right.dtype)
        return LowRank(left, right)

    def scaled(self, factor: float) -> Combination:
        """The update times ``factor``, shared by both sides."""
        root = abs(factor) ** 0.5
        return replace(self, left=self.left * (root if factor >= 0 else -root), right=self.right * root)

    def map(self, change: Callable[[Tensor], Tensor]) -> Combination:
        """The same with ``change`` applied to its matrices: one element of a batch, another device."""
        return replace(self, left=change(self.left), right=change(self.right))


@dataclass(frozen=True)
class Coordinates:
    """The updates of one module in a space.

    Attributes:
        cores: one per update, all of one shape (..., p, q).
        lift: the way back.
        rows: row scales (..., p) by which a method's inputs are divided and its output multiplied, or None.
        share: of the errors of the stored numbers, the part that cores have: see :func:`share_of`.
        whole: the updates in coordinates that lose nothing, where the cores have only a part of them.
    """

    cores: tuple[LowRank, ...]
    lift: Lift
    rows: Tensor | None = None
    share: float = 1.0
    whole: tuple[LowRank, ...] | None = None


def share_of(p: int, q: int, shape: tuple[int, int]) -> float:
    """What is left of rounding errors, which point anywhere in m and n dimensions (``shape``), in p and q of these."""
    m, n = shape
    return ((p / m + q / n) / 2) ** 0.5 if m and n else 1.0


def inside(rounding: Tensor | None, share: float) -> Tensor | None:
    """The relative errors of an update's core."""
    return None if rounding is None else rounding * share


Space = Callable[[Sequence[LowRank]], Coordinates]
"""``project``: the updates of one module (each (..., m, r_t) by (..., r_t, n)) → :class:`Coordinates`."""

SPACES: Registry[Space] = Registry("space")

from coremerge.spaces import core, ctm, full, knots  # noqa: E402, F401  (each registers itself)
