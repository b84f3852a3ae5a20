"""Task Arithmetic: weighted sums, the same in every space."""

from __future__ import annotations

from collections.abc import Sequence

from coremerge.lowrank import LowRank, total
from coremerge.methods import METHODS, Method, Site

SOURCE = "Task Arithmetic, arXiv 2212.04089"


@METHODS.register("sum", unitary=True, linear=True, continuous=True, source=SOURCE)
def sum_() -> Method:
    """Σ w_t X_t: Task Arithmetic."""

    def merge(cores: Sequence[LowRank], site: Site) -> LowRank:
        return total(cores)

    return merge


@METHODS.register("mean", unitary=True, linear=True, continuous=True, source=SOURCE)
def mean() -> Method:
    """Σ w_t X_t / T, T counting every adapter (one that lacks a module adds zero there)."""

    def merge(cores: Sequence[LowRank], site: Site) -> LowRank:
        return total(cores) * (1 / len(cores))

    return merge
