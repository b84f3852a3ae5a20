"""CtM: compress, then merge, in a space of a given rank that all adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.linalg import column_norms, eigh
from coremerge.lowrank import LowRank
from coremerge.registry import directions
from coremerge.spaces import SPACES, Coordinates, Lift, Space, inside, share_of
from coremerge.spaces.core import core

STEPS, EXACT = 1000, 1e-6
"""It ends when what is kept grows by no more than this share of itself, or after so many rounds: as published."""


@SPACES.register(
    "ctm",
    source="CtM, arXiv 2606.03723",
    shape=lambda summed, update: (summed, summed),
    keeps=lambda values: values["rank"],
    cuts=lambda values: [f"keeps at most {directions(values['rank'])} on each side, the same for all adapters"],
    dense=lambda values: 2.0,  # cores, and as they count
)
def ctm(rank: Annotated[int, Field(ge=1)] = 16, share: Annotated[float, Field(ge=0, le=1)] = 0.25) -> Space:
    """Merge ``rank`` × ``rank`` cores between the directions that hold most of all updates. What is outside is lost.

    From the cores M_t of core space, each brought nearer to their mean norm, a Tucker decomposition in two modes gives
    orthonormal P, Q for which Σ ‖Pᵀ M_t Q‖² is (locally) the largest, by alternating eigenproblems; the cores are the
    Pᵀ M_t Q. Choose it where the result must have a small rank and the method makes a flat spectrum (TIES, isotropize),
    which cannot be cut afterwards; not else, as other spaces lose nothing. A report says what is kept of each adapter.

    Args:
        rank: of all that is merged there; the paper takes the adapters' own.
        share: of an update's own norm in how much it counts for P and Q, the rest being the updates' mean norm; 1: all
            of it its own.
    """
    whole = core()

    def project(updates: Sequence[LowRank]) -> Coordinates:
        given = whole(updates)
        left, right = shared_directions(_as_they_count(given.cores, share), rank)
        part = share_of(left.shape[-1], right.shape[-1], given.cores[0].shape)
        small = tuple(_between(one, left, right, part) for one in given.cores)
        assert given.lift.left is not None and given.lift.right is not None
        lift = Lift(given.lift.left @ left, right.mT @ given.lift.right)
        return Coordinates(small, lift, share=given.share * part, whole=given.cores)

    return project


def _as_they_count(cores: Sequence[LowRank], share: float) -> Tensor:
    """(T, ..., p, q): brought nearer to their mean norm, and all to ordinary numbers."""
    dense = torch.stack([one.dense() for one in cores])
    norms = torch.stack([column_norms(one.flatten(-2).unsqueeze(-1)) for one in dense]).unsqueeze(-1)
    mean = norms.mean(0)
    return dense * torch.where(norms > 0, share / torch.where(mean > 0, mean, 1.0) + (1 - share) / norms, 0.0)


def _between(one: LowRank, left: Tensor, right: Tensor, share: float) -> LowRank:
    """``one`` between directions; its errors are of all of it, of which a share is there."""
    sides = (one.left, left.mT @ one.left), (one.right.mT, right.mT @ one.right.mT)
    rounding = inside(one.rounding, share)
    if rounding is not None:
        grown = [(column_norms(a) / column_norms(b)).nan_to_num(0, 0, 0) for a, b in sides]
        rounding = rounding * torch.maximum(*grown)
    return LowRank(sides[0][1], sides[1][1].mT, rounding)


def shared_directions(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (..., p, k), (..., q, l), at most ``rank`` each: Σ ‖leftᵀ core right‖² is (locally) the largest.

    ``cores``: (T, ..., p, q). Each element of a batch ends by itself.
    """
    left, right = (cores.new_zeros(*cores.shape[1:-2], n, min(n, rank)) for n in cores.shape[-2:])
    if not (left.shape[-1] and right.shape[-1]):
        return left, right
    right = _top((cores.mT @ cores).sum(0), rank)
    kept = cores.new_zeros(cores.shape[1:-2])
    ended = torch.zeros_like(kept, dtype=torch.bool)
    for _ in range(STEPS):
        stay = ended[..., None, None]
        seen = cores @ right
        left = torch.where(stay, left, _top((seen @ seen.mT).sum(0), rank))
        seen = left.mT @ cores
        right = torch.where(stay, right, _top((seen.mT @ seen).sum(0), rank))
        before, kept = kept, (seen @ right).square().sum((0, -2, -1))
        ended = ended | (kept - before <= EXACT * kept)
        if bool(ended.all()):
            break
    return left, right


def _top(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, the largest first."""
    return eigh(gram)[1][..., -min(rank, gram.shape[-1]) :].flip(-1)
