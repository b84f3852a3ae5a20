"""TSV-Merge: task singular vectors, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from coremerge.linalg import RaggedRankError, numerical_rank, polar
from coremerge.lowrank import LowRank, Matrix, ThinSVD, svds, thin_svd
from coremerge.methods import METHODS, Method, Site

ENERGY = 0.9
"""``rank="common"`` counts the directions that hold this share of a task's energy."""


@METHODS.register("tsv", unitary=True, source="Task Singular Vectors, arXiv 2412.00081")
def tsv(rank: Annotated[int, Field(ge=1)] | Literal["common"] | None = None) -> Method:
    """Put the tasks' singular vectors side by side, replace each stack by its polar factor, multiply back.

    X_t = U_t S_t V_tᵀ → polar([U_1 … U_T]) · diag(S_1 … S_T) · polar([V_1 … V_T])ᵀ.

    Args:
        rank: singular vectors per task; by default as many as the task's numerical rank, judged by the largest singular
            value of all tasks: rounding error must not claim a place in the polar factors. ``common``: at most the same
            number for every task, the median of how many hold 90 % of a task's energy. A number larger than a task's
            rank brings in vectors of singular value zero, as the published full-space code does with min(m, n)/T.
    """

    def components(core: LowRank, largest: Tensor | None, common: int | None) -> ThinSVD:
        if isinstance(rank, int):
            return (core.svd if rank <= core.svd.values.shape[-1] else thin_svd(core.dense())).truncate(rank)
        own = numerical_rank(core.svd.values, largest=largest)
        return core.svd.truncate(own if common is None else min(own, common))

    def merge(cores: Sequence[LowRank], site: Site) -> Matrix:
        spectra = torch.cat([svd.values for svd in svds(cores)], -1)
        largest = spectra.amax(-1) if spectra.shape[-1] else None
        common = common_rank([core.svd.values for core in cores]) if rank == "common" else None
        parts = [components(core, largest, common) for core in cores]
        left, left_orthonormal = polar(torch.cat([part.left for part in parts], -1))
        right, right_orthonormal = polar(torch.cat([part.right for part in parts], -2).mT)
        values = torch.cat([part.values for part in parts], -1)
        if left_orthonormal and right_orthonormal:
            return ThinSVD(left, values, right.mT)
        return LowRank(left * values.unsqueeze(-2), right.mT)

    return merge


def common_rank(spectra: Sequence[Tensor]) -> int:
    """The median, over the tasks that are not zero, of how many singular values hold :data:`ENERGY` of the energy.

    Args:
        spectra: per task (..., k), descending.

    Raises:
        RaggedRankError: the batch elements disagree.
    """
    energies = [values.square().cumsum(-1) for values in spectra if values.shape[-1]]
    if not energies:
        return 0
    counts = torch.stack([(e < ENERGY * e[..., -1:]).sum(-1) + 1.0 for e in energies], -1)
    present = torch.stack([e[..., -1] > 0 for e in energies], -1)
    median = torch.where(present, counts, torch.nan).nanquantile(0.5, -1).nan_to_num().round()
    if bool((median != median.flatten()[0]).any()):
        raise RaggedRankError
    return int(median.flatten()[0])
