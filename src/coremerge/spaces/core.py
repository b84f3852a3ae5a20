"""Core Space: p × q cores between reference bases of the stacked factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field

from coremerge.linalg import RTOL, column_basis
from coremerge.lowrank import LowRank, total
from coremerge.spaces import SPACES, Coordinates, Lift, Space, inside, share_of


@SPACES.register(
    "core",
    source="Core Space merging, arXiv 2509.17786, Definition 1 and appendix A.4",
    shape=lambda summed, update: (summed, summed),
)
def core(
    basis: Literal["stacked", "balanced"] = "stacked",
    rtol: Annotated[float, Field(gt=0, lt=1)] = RTOL,
    singular: bool = True,
) -> Space:
    """Merge p × q cores between the singular bases of the stacked factors, cut at their numerical rank.

    U are the left singular vectors of [left_1 … left_T], V the right ones of [right_1; …; right_T];
    the core of an update is Uᵀ left_t · right_t V. Its size does not depend on the layer's, and nothing is lost.

    Args:
        basis: ``stacked`` as in the paper: element-wise methods then see how each update is split into factors;
            ``balanced`` rewrites each update as U√S, √S Vᵀ first, so that only the updates themselves count.
        rtol: directions below this share of the largest singular value of a stack are cut, unless updates would show
            it: where one factor makes up for the other's size, both are brought to one size before. What is no larger
            than the rounding of the stored numbers is cut whatever this is, unless the recipe is linear.
        singular: the singular vectors themselves; else any orthonormal basis of their span, which is quicker. A recipe
            that does not say decides by its method: whether that sees the basis.
    """

    def project(updates: Sequence[LowRank]) -> Coordinates:
        given = list(updates)
        if basis == "balanced":
            given = [u.to(torch.float64) for u in given]
            updates = [u.svd.significant().lowrank() for u in given]
        stack = total(updates, torch.float64)
        sides = stack.left, stack.right.mT
        left, right = (
            column_basis(x, rtol, singular=singular, beside=y, rounding=stack.rounding)
            for x, y in zip(sides, reversed(sides), strict=True)
        )
        edges = list(pairwise(accumulate((u.rank for u in updates), initial=0)))
        share = share_of(left.rank, right.rank, stack.shape)
        cores = tuple(
            LowRank(left.coordinates[..., a:b], right.coordinates[..., a:b].mT, inside(u.rounding, share))
            for u, (a, b) in zip(updates, edges, strict=True)
        )
        lift = Lift(left.transform, right.transform.mT)
        return Coordinates(cores, lift if basis == "stacked" else _unbalanced(lift, given, updates, edges), share=share)

    return project


def _unbalanced(
    lift: Lift, given: Sequence[LowRank], balanced: Sequence[LowRank], edges: Sequence[tuple[int, int]]
) -> Lift:
    """``lift`` from the balanced factors, rewritten to start from the given ones.

    U√S = left · G with G = right · V / √S, so that no SVD has to come out the same way twice.
    """
    assert lift.left is not None and lift.right is not None
    lefts, rights = [], []
    for u, b, (start, end) in zip(given, balanced, edges, strict=True):
        values = b.left.square().sum(-2)  # S, since b.left = U√S
        lefts.append((u.right @ b.right.mT / values.unsqueeze(-2)) @ lift.left[..., start:end, :])
        rights.append(lift.right[..., start:end] @ (b.left.mT @ u.left / values.unsqueeze(-1)))
    return Lift(torch.cat(lefts, -2), torch.cat(rights, -1))
