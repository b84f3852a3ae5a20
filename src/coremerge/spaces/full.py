"""Weight space itself: the reference, and the place of element-wise methods as first published."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coremerge.lowrank import LowRank
from coremerge.spaces import SPACES, Coordinates, Lift, Space


@SPACES.register("full")
def full() -> Space:
    """No change of coordinates: cores are the updates, factored until an element-wise method asks for entries."""

    def project(updates: Sequence[LowRank]) -> Coordinates:
        return Coordinates(tuple(u.to(torch.float64) for u in updates), Lift())

    return project
