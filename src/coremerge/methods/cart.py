"""CART: low-rank deviations from the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from coremerge.lowrank import LowRank, total
from coremerge.methods import METHODS, Method, Site
from coremerge.registry import directions

Finite = Annotated[float, Field(allow_inf_nan=False)]


@METHODS.register(
    "cart",
    unitary=True,
    source="CART, arXiv 2412.12153",
    cuts=lambda values: [f"keeps at most {directions(values['rank'])} of each adapter's deviation from their mean"],
)
def cart(rank: Annotated[int, Field(ge=1)] = 8, scale: Finite = 1.0) -> Method:
    """mean + ``scale`` · Σ_t truncate_rank(X_t − mean).

    Args:
        rank: components kept of each deviation; a count, so that it means the same in every space.
        scale: λ of the paper, which searches it between 0.1 and 10.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> LowRank:
        mean = total(cores) * (1 / len(cores))
        return total([mean, *(scale * (core - mean).truncate(rank) for core in cores)])

    return merge
