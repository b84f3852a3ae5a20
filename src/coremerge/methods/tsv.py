"""TSV-Merge: task singular vectors, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.linalg import polar
from coremerge.lowrank import LowRank, Matrix, ThinSVD, svds, thin_svd
from coremerge.methods import METHODS, Method, Site


@METHODS.register(
    "tsv",
    unitary=True,
    source="Task Singular Vectors, arXiv 2412.00081",
    dense=lambda values: 2 * (values["pad"] and values["rank"] is not None),  # both sides of an SVD, for each task
    keeps=lambda values: values["rank"],
    neutral={"rank": None},
)
def tsv(rank: Annotated[int, Field(ge=1)] | None = None, pad: bool = False) -> Method:
    """Put the tasks' singular vectors side by side, replace each stack by its polar factor, multiply back.

    X_t = U_t S_t V_tᵀ → polar([U_1 … U_T]) · diag(S_1 … S_T) · polar([V_1 … V_T])ᵀ.

    Args:
        rank: at most so many singular vectors per task; by default as many as the task's numerical rank, judged by the
            largest singular value of all tasks: rounding error must not claim a place in the polar factors.
        pad: where a task's rank is below ``rank``, fill up with vectors of singular value zero, as the published
            full-space code does with ``rank`` = min(m, n)/T. They are arbitrary.
    """

    def components(core: LowRank, largest: Tensor | None) -> ThinSVD:
        own = core.svd.significant(largest=largest)
        if rank is not None and pad and rank > own.values.shape[-1]:
            return (core.svd if rank <= core.svd.values.shape[-1] else thin_svd(core.dense())).truncate(rank)
        return own if rank is None else own.truncate(rank)

    def merge(cores: Sequence[LowRank], site: Site) -> Matrix:
        spectra = torch.cat([svd.values for svd in svds(cores)], -1)
        largest = spectra.amax(-1) if spectra.shape[-1] else None
        return orthogonalized([components(core, largest) for core in cores])

    return merge


def orthogonalized(parts: Sequence[ThinSVD]) -> Matrix:
    """polar([U_1 … U_T]) · diag(S_1 … S_T) · polar([V_1 … V_T])ᵀ."""
    (left, left_orthonormal), (right, right_orthonormal) = covers(parts)
    values = torch.cat([part.values for part in parts], -1)
    if left_orthonormal and right_orthonormal:
        return ThinSVD(left, values, right.mT)
    return LowRank(left * values.unsqueeze(-2), right.mT)


def covers(parts: Sequence[ThinSVD]) -> tuple[tuple[Tensor, bool], tuple[Tensor, bool]]:
    """polar([U_1 … U_T]) and polar([V_1 … V_T]), and whether their columns are orthonormal."""
    rounding = _rounding(parts)
    return (
        polar(torch.cat([part.left for part in parts], -1), rounding=rounding),
        polar(torch.cat([part.right for part in parts], -2).mT, rounding=rounding),
    )


def _rounding(parts: Sequence[ThinSVD]) -> Tensor | None:
    """The errors of the singular vectors: u_i and v_i are off by what X_t is off by there, over σ_i."""
    known = [(part.noise, part.values) for part in parts if part.noise is not None]
    if len(known) < len(parts):
        return None
    return torch.cat([torch.where(s > 0, e / s, 1.0).clamp_max(1.0) for e, s in known], -1)
