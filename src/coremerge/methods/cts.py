"""CTS: directions that tasks have in common, and some of each task's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from coremerge.linalg import one_rank
from coremerge.lowrank import LowRank, Matrix, ThinSVD, thin_svd, total
from coremerge.methods import METHODS, Method, Site
from coremerge.methods.tsv import orthogonalized


@METHODS.register(
    "cts",
    unitary=True,
    source="Iso-CTS, arXiv 2502.04959: cts, then isotropize",
    cuts=lambda values: ["keeps as many directions as the sum of the adapters has, its own first"],
)
def cts(common: Annotated[float, Field(ge=0, le=1)] = 0.8) -> Method:
    """The leading directions of the sum, and in place of its last ones some that each task has outside of them.

    X = Σ X_t has d directions, of which U_c, S_c, V_c are about the share ``common``; of each X_t − U_c U_cᵀ X_t as
    many leading ones as make d together, the same number of each task that is not zero here. All left and all right
    vectors are replaced by their polar factors. With the step ``isotropize`` it is Iso-CTS; d is the numerical rank,
    not min(m, n).

    Args:
        common: the share of the d directions that is the sum's own, as near as T equal parts of the rest allow.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Matrix:
        whole = thin_svd(total(cores)).significant()
        count = whole.values.shape[-1]
        tasks = max(1, one_rank(torch.stack([core.norm() > 0 for core in cores]).sum(0)))
        each = min(round((count - int(common * count)) / tasks), count // tasks)
        shared = whole.truncate(count - each * tasks)
        return orthogonalized([shared, *(_outside(core, shared, each) for core in cores if each)])

    return merge


def _outside(core: LowRank, shared: ThinSVD, count: int) -> ThinSVD:
    """The ``count`` leading directions of what ``core`` has outside the left vectors of ``shared``."""
    largest = core.svd.values.amax(-1) if core.svd.values.shape[-1] else None
    rest = LowRank(core.left - shared.left @ (shared.left.mT @ core.left), core.right).svd
    own = replace(rest, noise=core.noise_along(rest.left, rest.right))  # of the numbers as stored, not of what is left
    return own.significant(largest=largest).truncate(count)
