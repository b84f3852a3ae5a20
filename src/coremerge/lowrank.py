"""An immutable low-rank matrix and its algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

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

    def to(self, *args: torch.dtype | torch.device | str) -> LowRank:
        """The same matrix in another dtype or on another device."""
        return LowRank(self.left.to(*args), self.right.to(*args))

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
    """left · diag(values) · right with orthonormal ``left`` (..., m, k), ``right`` (..., k, n), values descending or not."""

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
        return linalg.numerical_rank(self.values.sort(dim=-1, descending=True).values, rtol)

    def truncate(self, rank: int) -> ThinSVD:
        """The largest ``rank`` components, in descending order."""
        order = self.values.sort(dim=-1, descending=True, stable=True).indices[..., :rank]
        return ThinSVD(
            self.left.gather(-1, order.unsqueeze(-2).expand(*self.left.shape[:-1], order.shape[-1])),
            self.values.gather(-1, order),
            self.right.gather(-2, order.unsqueeze(-1).expand(*order.shape, self.right.shape[-1])),
        )

    def cut(self, rtol: float = linalg.RTOL) -> ThinSVD:
        """Only the components that count: truncated at the numerical rank."""
        return self.truncate(self.rank(rtol))

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


def total(matrices: Sequence[LowRank]) -> LowRank:
    """The exact sum of ``matrices``: factors side by side, rank Σ r."""
    return reduce(LowRank.__add__, matrices)
