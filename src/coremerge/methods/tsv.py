"""TSV-Merge: task singular vectors, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from coremerge.linalg import polar
from coremerge.lowrank import LowRank, Matrix, ThinSVD, thin_svd
from coremerge.methods import METHODS, Method, Site


@METHODS.register("tsv", unitary=True, source="Task Singular Vectors, arXiv 2412.00081")
def tsv(rank: Annotated[int, Field(ge=1)] | None = None) -> Method:
    """Put the tasks' singular vectors side by side, replace each stack by its polar factor, multiply back.

    X_t = U_t S_t V_tᵀ → polar([U_1 … U_T]) · diag(S_1 … S_T) · polar([V_1 … V_T])ᵀ.

    Args:
        rank: singular vectors per task; by default as many as the task's numerical rank. The published full-space code
            takes min(m, n)/T, most of which belong to zero singular values of a low-rank update.
    """

    def components(core: LowRank) -> ThinSVD:
        if rank is None:
            return core.svd.cut()
        return (core.svd if rank <= core.svd.values.shape[-1] else thin_svd(core.dense())).truncate(rank)

    def merge(cores: Sequence[LowRank], site: Site) -> Matrix:
        parts = [components(core) for core in cores]
        left, left_orthonormal = polar(torch.cat([part.left for part in parts], -1))
        right, right_orthonormal = polar(torch.cat([part.right for part in parts], -2).mT)
        values = torch.cat([part.values for part in parts], -1)
        if left_orthonormal and right_orthonormal:
            return ThinSVD(left, values, right.mT)
        return LowRank(left * values.unsqueeze(-2), right.mT)

    return merge
