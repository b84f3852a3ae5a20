"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

import math
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


@METHODS.register(
    "ties", elementwise=True, source="TIES-Merging, arXiv 2306.01708", cuts=trims, neutral={"density": 1.0}
)
def ties(density: Density = 0.2, reduce: Reduce = "mean") -> Method:
    """Keep each task's largest entries, elect the sign of their sum, average the entries that agree with it.

    Args:
        density: the share of entries of each core that is kept, in (0, 1].
        reduce: ``mean`` over the agreeing non-zero entries, or their ``sum``.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        return elected(cores, torch.stack([c.dense() for c in cores]), density, reduce)

    return merge


ROUNDING = 1e-14
"""An entry below this share of the largest of its matrix is rounding error, which has no sign to vote with."""

VOTE = 3.0
"""Nor has one that is no larger than so many times the mean error of an entry: the largest is √6 = 2.45 times that."""


def elected(cores: Sequence[LowRank], entries: Tensor, density: float, reduce: Reduce) -> Tensor:
    """TIES of ``entries`` (T, ..., p, q), which are those of ``cores``, or some of them made larger."""
    size = max(1, math.prod(cores[0].shape)) ** 0.5
    known = [(c.error / size, c.rounding.amax(-1)) for c in cores if c.error is not None and c.rounding is not None]
    if len(known) < len(cores) or not entries.numel():
        return elect(trim(entries, density), reduce)
    even, relative = (torch.stack(each)[..., None, None] for each in zip(*known, strict=True))
    kept = trim(entries, density, even)
    # large entries are sums of large products, whose errors are larger than the mean
    return elect(kept, reduce, torch.hypot(even, 2**0.5 * relative * entries.abs()))


def trim(x: Tensor, density: float, errors: Tensor | None = None) -> Tensor:
    """``x`` (..., p, q) with all but the ⌈density · p · q⌋ entries of largest magnitude set to zero, in each matrix.

    Rounding errors are zero, too; ``errors`` (..., 1, 1): how large they are.
    """
    size = x.shape[-2] * x.shape[-1]
    if not size:
        return x
    keep = max(1, round(density * size))
    magnitude = x.abs().flatten(-2)
    threshold = magnitude.amax(-1) * ROUNDING
    if errors is not None:
        threshold = threshold.maximum(VOTE * errors[..., 0, 0])
    if keep < size:
        threshold = threshold.maximum(magnitude.kthvalue(size - keep + 1, dim=-1).values)
    return torch.where(x.abs() >= threshold[..., None, None], x, 0.0)


def elect(x: Tensor, reduce: Reduce, errors: Tensor | None = None) -> Tensor:
    """``x`` (T, ..., p, q) → (..., p, q): the entries whose sign is that of the sum over T, averaged or summed.

    A sum that is no larger than the ``errors`` of its terms, of the same shape as ``x``, is zero, and so is the result.
    """
    votes = x.sum(0)
    if errors is not None:
        votes = torch.where(votes.abs() > VOTE * errors.square().sum(0).sqrt(), votes, 0.0)
    agree = (x.sign() == votes.sign()) & (x != 0)
    merged = torch.where(agree, x, 0.0).sum(0)
    return merged / agree.sum(0).clamp(min=1) if reduce == "mean" else merged
