"""Weight space itself: the reference, and the place of element-wise methods as first published."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from coremerge import linalg
from coremerge.lowrank import LowRank, total
from coremerge.spaces import SPACES, Coordinates, Lift, Space


@SPACES.register("full")
def full() -> Space:
    """No change of coordinates: cores are the updates, factored until an element-wise method asks for entries."""

    def project(updates: Sequence[LowRank]) -> Coordinates:
        updates = [u.to(torch.float64) for u in updates]
        stack = total(updates)
        if stack.rounding is None:
            return Coordinates(tuple(updates), Lift())
        lefts, rights = (linalg.above_rounding(x, stack.rounding) for x in (stack.left, stack.right.mT))
        edges = pairwise(accumulate((u.rank for u in updates), initial=0))
        cores = tuple(
            LowRank(lefts[..., a:b], rights[..., a:b].mT, u.rounding) for u, (a, b) in zip(updates, edges, strict=True)
        )
        return Coordinates(cores, Lift())

    return project
