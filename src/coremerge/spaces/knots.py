"""KnOTS: the shared left singular basis of the concatenated updates, from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from coremerge import linalg
from coremerge.lowrank import LowRank, total
from coremerge.spaces import SPACES, Coordinates, Lift, Space, inside, share_of


@SPACES.register(
    "knots",
    source="KnOTS, arXiv 2410.19735",
    shape=lambda summed, update: (summed, update[1]),
)
def knots(scaled: bool = True) -> Space:
    """Merge S V_t of the SVD [Δ_1 … Δ_T] = U S [V_1 … V_T], taken from the factors: no m × Tn matrix.

    With left_t = U' R_t (one basis for all) and right_t = L_t Q_t, the SVD of the small [R_1 L_1 … R_T L_T] gives
    U and S.

    Args:
        scaled: methods see S V_t, as in the KnOTS paper; ``false``: V_t alone, as in the Core Space code, whose
            result is scaled by S afterwards.
    """

    def project(updates: Sequence[LowRank]) -> Coordinates:
        updates = [u.to(torch.float64) for u in updates]
        stack = total(updates)
        basis = linalg.column_basis(stack.left, beside=stack.right.mT, rounding=stack.rounding)
        rows = linalg.above_rounding(stack.right.mT, stack.rounding)
        edges = list(pairwise(accumulate((u.rank for u in updates), initial=0)))
        lefts, rights = ([x[..., a:b] for a, b in edges] for x in (basis.coordinates, rows))
        small = torch.cat([a @ linalg.qr(b)[1].mT for a, b in zip(lefts, rights, strict=True)], -1)
        vectors, sigma, _ = linalg.svd(small)
        share = share_of(basis.rank, stack.shape[1], stack.shape)
        inner = [inside(u.rounding, share) for u in updates]
        rank = linalg.numerical_rank(sigma, linalg.NOISE)
        vectors, sigma = vectors[..., :rank], sigma[..., :rank]
        cores = tuple(LowRank(vectors.mT @ a, b.mT, c) for a, b, c in zip(lefts, rights, inner, strict=True))
        return Coordinates(cores, Lift(left=basis.transform @ vectors), None if scaled else sigma, share)

    return project
