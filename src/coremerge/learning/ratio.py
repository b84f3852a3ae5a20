"""The null-space ratio: the share of an activation that an adapter's down-projection does not see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import Tensor

from coremerge import linalg
from coremerge.rounding import column_rounding

FLOOR = 1e-6
"""Squared ratios below it are continued linearly to zero, so that the root's slope stays finite."""


def row_basis(right: Tensor) -> Tensor:
    """An orthonormal basis (p, n) of the rows of ``right`` (r, n), over its numerical rank p, in float64.

    Directions that are no larger than the rounding of the stored numbers are none.
    """
    right = right.detach()
    columns = linalg.above_rounding(right.mT, column_rounding(right.mT, right.dtype))
    _, values, rows = linalg.svd(columns.mT)
    return rows[: linalg.numerical_rank(values)]


def null_space_ratio(x: Tensor, right: Tensor, mask: Tensor | None = None) -> Tensor:
    """ω = ‖z − P z‖ / ‖z‖ of activations z, P the projector onto the rows of a down-projection A.

    It does not depend on the adapter's scale, nor on how its update is split into factors. Computed in float32 at
    least and clamped to [0, 1]; the gradient is finite everywhere. A zero activation has ratio 1.

    Args:
        x: activations (..., n).
        right: A (r, n), of any rank and scale.
        mask: (...), true or positive where an activation counts.

    Returns:
        (...), or the mean over the mask where there is one.

    Source: Null-Space Compression merging (CVPR 2026), the definition of ω.

    Example:
        >>> a = torch.tensor([[2.0, 0.0, 0.0]])
        >>> null_space_ratio(torch.tensor([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]]), a).tolist()
        [0.0, 0.800000011920929]
    """
    ratio = ratio_to_basis(x, row_basis(right))
    return ratio if mask is None else mean_over(ratio, mask)


def ratio_to_basis(x: Tensor, basis: Tensor) -> Tensor:
    """:func:`null_space_ratio` with the rows' orthonormal ``basis`` (p, n) at hand."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x / x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # squares neither overflow
        inside = (x @ basis.mT.to(x)).square().sum(-1)
        whole = x.square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny)
        outside = (1 - inside / whole).clamp(0, 1)
        return torch.where(outside > FLOOR, outside.clamp_min(FLOOR).sqrt(), outside / FLOOR**0.5)


class MeanRatios:
    """Mean null-space ratios by key: over all tokens that count, however these are shared out among batches."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, float] = defaultdict(float)
        self._tokens: dict[Hashable, float] = defaultdict(float)

    def add(self, key: Hashable, x: Tensor, basis: Tensor, mask: Tensor | None) -> None:
        """Activations ``x`` (..., n), the rows' ``basis`` (p, n), and which of them count (...); None: all."""
        total, count = sum_over(ratio_to_basis(x, basis), mask)
        self._sums[key] += float(total)
        self._tokens[key] += float(count)

    def get(self, key: Hashable) -> float | None:
        """The mean; None where no token came."""
        return self._sums[key] / self._tokens[key] if self._tokens[key] else None


def sum_over(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` (...) where ``mask`` (...) is true or positive, and how many these are; None: everywhere."""
    if mask is None:
        return values.sum(), values.new_tensor(float(values.numel()))
    counts = (mask.to(values.device) > 0).to(values.dtype)
    return (values * counts).sum(), counts.sum()


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Their mean; 0 where the mask is true nowhere."""
    total, count = sum_over(values, mask)
    return total / count.clamp_min(1)
