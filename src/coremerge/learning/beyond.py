"""Directions of a module's inputs that no adapter reads: by them a merged update tells the tasks' inputs apart.

An adapter's rows are few, and inputs of all tasks look alike along them. What is asked of one core for several tasks
then contradicts itself: what one task's inputs need is what another's must not get. The inputs themselves differ
elsewhere. A core that reads those directions, too, answers each task in its own way. Its rank is still at most the sum
of the adapters', as it writes where they do.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from coremerge import linalg

BEYOND = 128
"""Directions of a module's inputs that are read besides the adapters' own."""

OVER = 8
"""Random directions more than are asked for: the last of those that are found are then right as well."""


@dataclass(frozen=True)
class Sketch:
    """Of one task's inputs x at one module.

    Attributes:
        size: Σ ‖x‖².
        along: (n, s) Σ x (xᵀ Ω), float64, with Ω of :func:`drawn`.
    """

    size: float
    along: Tensor

    @classmethod
    def of(cls, x: Tensor, draw: Tensor) -> Sketch:
        """Of the tokens ``x`` (tokens, n)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = float(x.abs().max()) if x.numel() else 0.0
        if not largest:
            return cls(0.0, torch.zeros(draw.shape, dtype=torch.float64))
        x = x / largest  # products of large numbers are beyond float32
        along = (x.mT @ (x @ draw.to(x))).double().cpu()
        return cls(float(x.double().square().sum()) * largest**2, along * largest**2)

    def __add__(self, other: Sketch) -> Sketch:
        return Sketch(self.size + other.size, self.along + other.along)


@lru_cache(maxsize=8)
def drawn(n: int, count: int) -> Tensor:
    """Ω (n, s): random numbers along which inputs are seen, the same for all of one width."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, min(n, count + OVER), generator=generator, dtype=torch.float32)


def directions(sketches: Collection[Sketch], right: Tensor, count: int) -> Tensor:
    """The directions (e, n) outside the rows of ``right`` (q, n) in which inputs are largest, at most ``count``.

    Every task counts alike, whatever the size of its inputs. Orthonormal, float64. Inputs that are not finite are not
    seen here; what they are comes out where they are fitted.

    Source: ours, by a randomized range finder (Halko, Martinsson, Tropp, arXiv 0909.4061).
    """
    seen = [sketch for sketch in sketches if 0 < sketch.size < math.inf]
    if not seen or count < 1:
        return right[:0]
    whole = torch.stack([sketch.along / sketch.size for sketch in seen]).sum(0)
    rest = whole
    for _ in range(2):  # twice is enough for rounding
        rest = rest - right.mT @ (right @ rest)
    vectors, sizes, _ = linalg.svd(rest)
    kept = min(count, right.shape[-1] - len(right), int((sizes > linalg.RTOL * whole.norm()).sum()))
    return vectors[:, : max(kept, 0)].mT.contiguous()
