"""Rewrite updates so that only they count, not how they are split into factors."""

from __future__ import annotations

from coremerge.lowrank import LowRank
from coremerge.steps import STEPS, Before, Step


@STEPS.register("balance", unitary=True)
def balance() -> Step:
    """Before merging: each update as U√S, √S Vᵀ, which makes element-wise methods in core space gauge invariant."""
    return Before(LowRank.balanced)
