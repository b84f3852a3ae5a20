"""How precisely numbers are stored: the errors below which nothing that is computed from them has a meaning."""

from __future__ import annotations

import torch
from torch import Tensor

NARROWER = (torch.bfloat16, torch.float16, torch.float32)
"""Formats that a file of a wider one may have come from, the coarsest first."""

GLANCE = 64
"""Numbers that are looked at before all are."""


def stored_rounding(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(r,), float64: the mean relative error of the columns of ``left`` (m, r) or the rows of ``right`` (r, n).

    Of the two the coarser. The factors are as they were stored in ``dtype``, without a scale. What counts is the
    coarsest format that holds them: PEFT loads 16-bit adapters in float32, and saves them so.
    """
    return torch.maximum(column_rounding(left, dtype), column_rounding(right.mT, dtype))


def column_rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(r,), float64: the mean relative error of the columns of one factor (m, r): see :func:`stored_rounding`."""
    return _relative(x, _precision(x, dtype))


def _precision(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    eps = torch.finfo(dtype).eps
    return next((kind for kind in NARROWER if torch.finfo(kind).eps > eps and _holds(kind, x)), dtype)


def _holds(kind: torch.dtype, x: Tensor) -> bool:
    few = x.flatten()[:GLANCE]
    return bool((few.to(kind).to(x.dtype) == few).all()) and bool((x.to(kind).to(x.dtype) == x).all())


MEAN = 6**-0.5
"""The root mean square of a rounding error, next to the largest: 1/√3 as it is uniform, and 1/√2 as the spacing of
numbers between two powers of 2, where they are evenly spread in logarithm, is next to them between 1 and 1/2."""


def _relative(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean error of ``dtype``; more for columns whose numbers are among its smallest, as in float16."""
    info = torch.finfo(dtype)
    unit, least = MEAN * info.eps / 2, MEAN * info.smallest_normal * info.eps / 2
    if least < 2.0**-100:  # no trained number comes near the smallest of bfloat16, float32 and float64
        return torch.full(x.shape[-1:], unit, dtype=torch.float64, device=x.device)
    sizes = x.double().square().mean(-2)
    return torch.where(sizes > 0, (unit**2 + least**2 / sizes).sqrt(), unit)
