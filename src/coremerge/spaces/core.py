"""Core Space: p × q cores between reference bases of the stacked factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Literal

from pydantic import Field

from coremerge.linalg import RTOL, column_basis
from coremerge.lowrank import LowRank, total
from coremerge.spaces import SPACES, Coordinates, Lift, Space


@SPACES.register("core", source="Core Space merging, arXiv 2509.17786, Definition 1 and appendix A.4")
def core(basis: Literal["stacked", "balanced"] = "stacked", rtol: Annotated[float, Field(gt=0, lt=1)] = RTOL) -> Space:
    """Merge p × q cores between the singular bases of the stacked factors, cut at their numerical rank.

    U are the left singular vectors of [left_1 … left_T], V the right ones of [right_1; …; right_T];
    the core of an update is Uᵀ left_t · right_t V. Its size does not depend on the layer's, and nothing is lost.

    Args:
        basis: ``stacked`` as in the paper: element-wise methods then see how each update is split into factors;
            ``balanced`` rewrites each update as U√S, √S Vᵀ first, so that only the updates themselves count.
        rtol: directions below this share of the largest singular value of a stack are cut.
    """

    def project(updates: Sequence[LowRank]) -> Coordinates:
        if basis == "balanced":
            updates = [u.balanced() for u in updates]
        stack = total(updates)
        left, right = column_basis(stack.left, rtol), column_basis(stack.right.mT, rtol)
        edges = accumulate((u.rank for u in updates), initial=0)
        cores = tuple(LowRank(left.coordinates[..., a:b], right.coordinates[..., a:b].mT) for a, b in pairwise(edges))
        return Coordinates(cores, Lift(left.transform, right.transform.mT, basis == "balanced"))

    return project
