"""KnOTS: the shared left singular basis of the concatenated updates, from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from coremerge import linalg
from coremerge.lowrank import LowRank, total
from coremerge.spaces import SPACES, Coordinates, Lift, Space


@SPACES.register("knots", source="KnOTS, arXiv 2410.19735")
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
        basis = linalg.column_basis(stack.left, beside=stack.right.mT)
        edges = accumulate((u.rank for u in updates), initial=0)
        lefts = [basis.coordinates[..., a:b] for a, b in pairwise(edges)]
        small = torch.cat([a @ linalg.qr(u.right.mT)[1].mT for a, u in zip(lefts, updates, strict=True)], -1)
        vectors, sigma, _ = linalg.svd(small)
        rank = linalg.numerical_rank(sigma, linalg.NOISE)
        vectors, sigma = vectors[..., :rank], sigma[..., :rank]
        cores = tuple(LowRank(vectors.mT @ a, u.right) for a, u in zip(lefts, updates, strict=True))
        return Coordinates(cores, Lift(left=basis.transform @ vectors), None if scaled else sigma)

    return project
