"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site
from coremerge.registry import Values

Density = Annotated[float, Field(gt=0, le=1)]
Reduce = Literal["mean", "sum"]


def trims(values: Values) -> list[str]:
    """What is left out, in words."""
    share = values["density"]
    return [f"keeps the largest entries of each adapter's core, a share of {share:g}, and of them one sign"]


@METHODS.register("ties", elementwise=True, source="TIES-Merging, arXiv 2306.01708", cuts=trims)
def ties(density: Density = 0.2, reduce: Reduce = "mean") -> Method:
    """Keep each task's largest entries, elect the sign of their sum, average the entries that agree with it.

    Args:
        density: the share of entries of each core that is kept, in (0, 1].
        reduce: ``mean`` over the agreeing non-zero entries, or their ``sum``.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        return elect(trim(torch.stack([c.dense() for c in cores]), density), reduce)

    return merge


ROUNDING = 1e-14
"""An entry below this share of the largest of its matrix is rounding error, which has no sign to vote with."""


def trim(x: Tensor, density: float) -> Tensor:
    """``x`` (..., p, q) with all but the ⌈density · p · q⌋ entries of largest magnitude set to zero, in each matrix.

    Rounding errors are zero, too.
    """
    size = x.shape[-2] * x.shape[-1]
    if not size:
        return x
    keep = max(1, round(density * size))
    magnitude = x.abs().flatten(-2)
    threshold = magnitude.amax(-1) * ROUNDING
    if keep < size:
        threshold = threshold.maximum(magnitude.kthvalue(size - keep + 1, dim=-1).values)
    return torch.where(x.abs() >= threshold[..., None, None], x, 0.0)


def elect(x: Tensor, reduce: Reduce) -> Tensor:
    """``x`` (T, ..., p, q) → (..., p, q): the entries whose sign is that of the sum over T, averaged or summed."""
    agree = (x.sign() == x.sum(0).sign()) & (x != 0)
    merged = torch.where(agree, x, 0.0).sum(0)
    return merged / agree.sum(0).clamp(min=1) if reduce == "mean" else merged
