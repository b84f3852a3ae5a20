"""An immutable low-rank matrix and its algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coremerge import linalg
from coremerge.errors import TensorError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``left @ right``, never formed unless :meth:`dense` is called.

    Args:
        left: (..., m, r), any scale already folded in.
        right: (..., r, n), of the same dtype and device.

    Raises:
        TensorError: the factors do not fit each other or are not floating point.

    Example:
        >>> update = LowRank(torch.ones(3, 1), torch.ones(1, 2))
        >>> update.shape, (2 * update + update).dense()[0, 0].item()
        ((3, 2), 3.0)
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        fits = left.ndim >= 2 and left.ndim == right.ndim and left.shape[:-2] == right.shape[:-2]
        if not fits or left.shape[-1] != right.shape[-2]:
            raise TensorError(
                f"left {tuple(left.shape)} and right {tuple(right.shape)} do not multiply",
                remedy="Give left (m, r) and right (r, n)",
            )
        if not left.is_floating_point() or left.dtype != right.dtype:
            raise TensorError(f"factors of dtype {left.dtype} and {right.dtype}: one floating dtype is needed")

    @classmethod
    def zeros(cls, m: int, n: int, dtype: torch.dtype = torch.float64) -> LowRank:
        """The zero matrix (m, n), of rank 0."""
        return cls(torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[-2], self.right.shape[-1]

    @property
    def rank(self) -> int:
        """The inner width r: an upper bound of the matrix rank."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of both factors."""
        return self.left.dtype

    @property
    def mT(self) -> LowRank:  # noqa: N802 - torch's name
        """The transpose."""
        return LowRank(self.right.mT, self.left.mT)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(torch.cat([self.left, other.left], -1), torch.cat([self.right, other.right], -2))

    def __mul__(self, scalar: float | Tensor) -> LowRank:
        return LowRank(self.left * scalar, self.right)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -other

    def dense(self) -> Tensor:
        """The matrix itself (..., m, n): large."""
        return self.left @ self.right

    def to(self, where: torch.dtype | torch.device | str) -> LowRank:
        """The same matrix in another dtype or on another device."""
        return self if where in (self.dtype, self.left.device) else LowRank(self.left.to(where), self.right.to(where))

    @cached_property
    def svd(self) -> ThinSVD:
        """Thin SVD, from QR of the factors and an r × r SVD; of width min(m, r, n)."""
        return ThinSVD(*linalg.product_svd(self.left, self.right))

    def norm(self) -> Tensor:
        """Frobenius norm (...)."""
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: LowRank) -> Tensor:
        """Frobenius inner product ⟨self, other⟩ (...), from r × r Gram matrices."""
        return ((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum((-2, -1))

    def balanced(self) -> LowRank:
        """The same matrix as U√S, √S Vᵀ: depends on the product only, not on its factors."""
        return self.svd.lowrank()

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of rank at most ``rank`` (Eckart–Young), balanced."""
        return self.svd.truncate(rank).lowrank()


@dataclass(frozen=True, eq=False)
class ThinSVD:
    """left · diag(values) · right, ``left`` (..., m, k) and ``right`` (..., k, n) orthonormal, values in any order."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[-2], self.right.shape[-1]

    @property
    def svd(self) -> ThinSVD:
        """Itself: so that anything with a ``.svd`` can be decomposed."""
        return self

    def rank(self, rtol: float = linalg.RTOL) -> int:
        """Numerical rank."""
        return linalg.numerical_rank(self.descending.values, rtol)

    @property
    def descending(self) -> ThinSVD:
        """The same with its values in descending order."""
        if bool((self.values[..., 1:] <= self.values[..., :-1]).all()):
            return self
        values, order = self.values.sort(dim=-1, descending=True, stable=True)
        return ThinSVD(
            self.left.gather(-1, order.unsqueeze(-2).expand_as(self.left)),
            values,
            self.right.gather(-2, order.unsqueeze(-1).expand_as(self.right)),
        )

    def truncate(self, rank: int) -> ThinSVD:
        """The largest ``rank`` components, in descending order."""
        return self.descending._first(rank)

    def cut(self, rtol: float = linalg.RTOL) -> ThinSVD:
        """Only the components that count: truncated at the numerical rank."""
        best = self.descending
        return best._first(linalg.numerical_rank(best.values, rtol))

    def _first(self, count: int) -> ThinSVD:
        if count >= self.values.shape[-1]:
            return self
        return ThinSVD(self.left[..., :count], self.values[..., :count], self.right[..., :count, :])

    def lowrank(self) -> LowRank:
        """As balanced factors U√S and √S Vᵀ."""
        root = self.values.sqrt()
        return LowRank(self.left * root.unsqueeze(-2), root.unsqueeze(-1) * self.right)

    def dense(self) -> Tensor:
        """The matrix itself (..., m, n)."""
        return (self.left * self.values.unsqueeze(-2)) @ self.right


Matrix = LowRank | ThinSVD | Tensor
"""What methods take and give: factored where they can, dense where they must."""


def dense(matrix: Matrix) -> Tensor:
    """``matrix`` as a tensor (..., p, q)."""
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


def thin_svd(matrix: Matrix) -> ThinSVD:
    """Thin SVD of any kind of matrix; free where it is one already."""
    return ThinSVD(*linalg.svd(matrix)) if isinstance(matrix, Tensor) else matrix.svd


def svds(matrices: Sequence[LowRank]) -> list[ThinSVD]:
    """The ``.svd`` of each; those of one shape and rank are worked out in one go."""
    first = matrices[0]
    alike = all(m.left.shape == first.left.shape and m.right.shape == first.right.shape for m in matrices)
    if len(matrices) > 1 and alike and not any("svd" in vars(m) for m in matrices):
        left, right = torch.stack([m.left for m in matrices]), torch.stack([m.right for m in matrices])
        for matrix, *parts in zip(matrices, *linalg.product_svd(left, right), strict=True):
            vars(matrix)["svd"] = ThinSVD(*parts)
    return [matrix.svd for matrix in matrices]


def total(matrices: Sequence[LowRank], dtype: torch.dtype | None = None) -> LowRank:
    """The exact sum of ``matrices``: factors side by side, rank Σ r; in ``dtype``, if given."""
    return LowRank(
        _side_by_side([m.left for m in matrices], -1, dtype), _side_by_side([m.right for m in matrices], -2, dtype)
    )


def _side_by_side(parts: Sequence[Tensor], dim: int, dtype: torch.dtype | None) -> Tensor:
    if dtype in (None, parts[0].dtype):
        return torch.cat(list(parts), dim)
    # torch.cat and a change of dtype would go through memory twice
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    stack, start = parts[0].new_empty(shape, dtype=dtype), 0
    for part in parts:
        stack.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return stack
