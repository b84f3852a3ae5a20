"""Compress, then merge: a space of fixed rank, as a plugin would register it; only for comparison, as it loses much.

Source: CtM, arXiv 2606.03723: Tucker-2 of the stacked cores, by higher-order orthogonal iteration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from coremerge import linalg
from coremerge.lowrank import LowRank
from coremerge.spaces import SPACES, Coordinates, Lift, Space

STEPS, EXACT = 1000, 1e-6


@contextmanager
def registered() -> Iterator[None]:
    """As the space ``ctm``, for a while: other spaces lose nothing, which some rely on."""
    SPACES.register("ctm", source="CtM, arXiv 2606.03723")(ctm)
    try:
        yield
    finally:
        del SPACES.entries["ctm"]


def ctm(rank: int = 16, share: float = 0.25) -> Space:
    """The ``rank`` directions on each side that hold most of all updates, and the updates between them.

    Args:
        rank: of all that is merged there.
        share: of an update's own norm in what it counts, the rest being the updates' mean norm.
    """
    whole = SPACES["core"].make()

    def project(updates: Sequence[LowRank]) -> Coordinates:
        given = whole(updates)
        cores = [core.dense() for core in given.cores]
        norms = torch.stack([core.square().sum((-2, -1), keepdim=True).sqrt() for core in cores])
        factors = share + (1 - share) * norms.mean(0) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        left, right = shared_directions([core * factor for core, factor in zip(cores, factors, strict=True)], rank)
        small = tuple(LowRank(left.mT @ core.left, core.right @ right) for core in given.cores)
        assert given.lift.left is not None and given.lift.right is not None
        return Coordinates(small, Lift(given.lift.left @ left, right.mT @ given.lift.right))

    return project


def shared_directions(cores: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (..., p, k), (..., q, k), k at most ``rank``: Σ ‖leftᵀ core right‖² is (locally) the largest."""
    right = _top(sum(core.mT @ core for core in cores), rank)
    kept = 0.0
    for _ in range(STEPS):
        left = _top(sum(core @ right @ right.mT @ core.mT for core in cores), rank)
        right = _top(sum(core.mT @ left @ left.mT @ core for core in cores), rank)
        before, kept = kept, sum(float((left.mT @ core @ right).square().sum()) for core in cores)
        if kept - before <= EXACT * kept:
            break
    return left, right


def _top(gram: Tensor | int, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, each with its largest entry positive."""
    assert isinstance(gram, Tensor)
    vectors = linalg.eigh(gram)[1][..., -rank:]
    signs = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    return vectors * signs
