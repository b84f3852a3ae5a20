"""STAR: leave out each update's weak directions and give the others their strength."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coremerge.linalg import one_rank
from coremerge.lowrank import LowRank, ThinSVD
from coremerge.registry import Values
from coremerge.steps import STEPS, Before, Step


def _cuts(values: Values) -> list[str]:
    share = values["keep"]
    return [] if share == 1 else [f"keeps the directions of each adapter that have {share:.0%} of its nuclear norm"]


@STEPS.register("star", unitary=True, source="STAR, arXiv 2502.10339", cuts=_cuts)
def star(keep: Annotated[float, Field(gt=0, le=1)] = 0.4) -> Step:
    """Before merging: of each update the fewest directions with that share of its nuclear norm, scaled to all of it.

    Args:
        keep: the share η, in (0, 1].
    """

    def apply(update: LowRank) -> LowRank:
        if keep == 1:
            return update
        svd = update.svd.significant()
        values = svd.values
        if values.shape[-1] == 0:
            return svd.lowrank()
        whole, so_far = values.sum(-1), values.cumsum(-1)
        kept = svd.truncate(one_rank((so_far < keep * whole.unsqueeze(-1) * (1 - 1e-12)).sum(-1)) + 1)
        grown = (whole / kept.values.sum(-1)).unsqueeze(-1)
        noise = None if kept.noise is None else kept.noise * grown
        return ThinSVD(kept.left, kept.values * grown, kept.right, noise).lowrank()

    return Before(apply)
