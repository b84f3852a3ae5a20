"""An immutable low-rank matrix and its algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        rounding: (..., r), float64: the relative error of the numbers of each column of ``left`` and row of ``right``,
            as they were rounded when they were stored; None: they count as exact.

    Raises:
        TensorError: the factors do not fit each other or are not floating point.

    Example:
        >>> update = LowRank(torch.ones(3, 1), torch.ones(1, 2))
        >>> update.shape, (2 * update + update).dense()[0, 0].item()
        ((3, 2), 3.0)
    """

    left: Tensor
    right: Tensor
    rounding: Tensor | None = None

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
        return LowRank(self.right.mT, self.left.mT, self.rounding)

    def __add__(self, other: LowRank) -> LowRank:
        return total([self, other])

    def __mul__(self, scalar: float | Tensor) -> LowRank:
        return LowRank(self.left * scalar, self.right, self.rounding)

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
        if where in (self.dtype, self.left.device):
            return self
        on = None if self.rounding is None else self.rounding.to(self.left.to(where).device)
        return LowRank(self.left.to(where), self.right.to(where), on)

    def rounded(self, rounding: Tensor | None) -> LowRank:
        """The same matrix, its numbers known to that relative error."""
        return LowRank(self.left, self.right, rounding)

    @cached_property
    def noise(self) -> Tensor | None:
        """How far (...) the errors of the stored numbers move a direction of the product; None: it is exact.

        Column j of ``left`` is off by a random vector of norm ρ_j‖left_j‖, ρ the :attr:`rounding`; so the product is by
        one that takes a unit vector v to Σ_j ρ_j‖left_j‖ (right_j · v), at most ‖diag(ρ_j‖left_j‖) right‖₂, and
        likewise on the other side.
        """
        if self.rounding is None:
            return None
        left, right = self.left.double(), self.right.double()
        sizes = self.rounding * linalg.column_norms(left), self.rounding * linalg.column_norms(right.mT)
        sides = sizes[0].unsqueeze(-1) * right, (sizes[1].unsqueeze(-2) * left).mT
        return torch.hypot(*(linalg.spectral_norm(side) for side in sides))

    @property
    def error(self) -> Tensor | None:
        """The Frobenius norm (...) that the errors of the stored numbers have in the product; None: it is exact."""
        if self.rounding is None:
            return None
        sizes = linalg.column_norms(self.left.double()) * linalg.column_norms(self.right.mT.double())
        return 2**0.5 * (self.rounding * sizes).square().sum(-1).sqrt()

    @cached_property
    def svd(self) -> ThinSVD:
        """Thin SVD, from QR of the factors and an r × r SVD; of width min(m, r, n)."""
        return ThinSVD(*linalg.product_svd(self.left, self.right), self.noise)

    def norm(self) -> Tensor:
        """Frobenius norm (...)."""
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: LowRank) -> Tensor:
        """Frobenius inner product ⟨self, other⟩ (...), from r × r Gram matrices."""
        return ((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum((-2, -1))

    def balanced(self) -> LowRank:
        """The same matrix as U√S, √S Vᵀ: depends on the product only, not on its factors.

        Directions that are no larger than the errors of the factors become zero.
        """
        svd = self.svd
        if svd.noise is None:
            return svd.lowrank()
        least = linalg.LEVEL * svd.noise.unsqueeze(-1)
        return replace(svd, values=torch.where(svd.values > least, svd.values, 0.0)).lowrank()

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of rank at most ``rank`` (Eckart–Young), balanced."""
        return self.svd.truncate(rank).lowrank()


@dataclass(frozen=True, eq=False)
class ThinSVD:
    """left · diag(values) · right, ``left`` (..., m, k) and ``right`` (..., k, n) orthonormal, values in any order.

    ``noise`` (...): how far the errors of the stored numbers move a direction: see :attr:`LowRank.noise`.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    noise: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[-2], self.right.shape[-1]

    @property
    def svd(self) -> ThinSVD:
        """Itself: so that anything with a ``.svd`` can be decomposed."""
        return self

    def rank(self, rtol: float = linalg.RTOL) -> int:
        """Numerical rank: how many values are above the errors of what was stored, and ``rtol`` times the largest."""
        return linalg.numerical_rank(self.descending.values, rtol, noise=self.noise)

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
            self.noise,
        )

    def truncate(self, rank: int) -> ThinSVD:
        """The largest ``rank`` components, in descending order."""
        return self.descending._first(rank)

    def cut(self, rtol: float = linalg.RTOL) -> ThinSVD:
        """Only the components that are not zero: above ``rtol`` times the largest."""
        best = self.descending
        return best._first(linalg.numerical_rank(best.values, rtol))

    def significant(self, rtol: float = linalg.RTOL) -> ThinSVD:
        """Only the components that are directions: truncated at the :meth:`rank`."""
        return self.descending._first(self.rank(rtol))

    def _first(self, count: int) -> ThinSVD:
        if count >= self.values.shape[-1]:
            return self
        return ThinSVD(self.left[..., :count], self.values[..., :count], self.right[..., :count, :], self.noise)

    def lowrank(self) -> LowRank:
        """As balanced factors U√S and √S Vᵀ; the noise moves u_i and v_i by its share of σ_i."""
        root = self.values.sqrt()
        return LowRank(self.left * root.unsqueeze(-2), root.unsqueeze(-1) * self.right, self._rounding)

    @property
    def _rounding(self) -> Tensor | None:
        if self.noise is None:
            return None
        each = self.noise.unsqueeze(-1) / 2**0.5
        return torch.where(self.values > 0, each / self.values, 0.0)

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
    together = _together(matrices, "svd")
    if together is not None:
        noises(matrices)
        for matrix, u, values, vh in zip(matrices, *linalg.product_svd(together.left, together.right), strict=True):
            vars(matrix)["svd"] = ThinSVD(u, values, vh, matrix.noise)
    return [matrix.svd for matrix in matrices]


def noises(matrices: Sequence[LowRank]) -> list[Tensor | None]:
    """The :attr:`LowRank.noise` of each; those of one shape and rank are worked out in one go."""
    together = _together(matrices, "noise")
    if together is not None and together.noise is not None:
        for matrix, noise in zip(matrices, together.noise, strict=True):
            vars(matrix)["noise"] = noise
    return [matrix.noise for matrix in matrices]


def _together(matrices: Sequence[LowRank], cached: str) -> LowRank | None:
    """All in one batch, if that is possible, and what is asked for is not known of some already."""
    first = matrices[0]
    alike = all(m.left.shape == first.left.shape and m.right.shape == first.right.shape for m in matrices)
    if len(matrices) < 2 or not alike or any(cached in vars(m) for m in matrices):
        return None
    roundings = [m.rounding for m in matrices if m.rounding is not None]
    left, right = torch.stack([m.left for m in matrices]), torch.stack([m.right for m in matrices])
    return LowRank(left, right, torch.stack(roundings) if len(roundings) == len(matrices) else None)


def total(matrices: Sequence[LowRank], dtype: torch.dtype | None = None) -> LowRank:
    """The exact sum of ``matrices``: factors side by side, rank Σ r; in ``dtype``, if given."""
    return LowRank(
        _side_by_side([m.left for m in matrices], -1, dtype),
        _side_by_side([m.right for m in matrices], -2, dtype),
        _roundings(matrices),
    )


def noise_of_sum(matrices: Sequence[LowRank]) -> Tensor | None:
    """The :attr:`LowRank.noise` (...) of the sum of ``matrices``, whose errors are independent; None: all are exact."""
    known = [noise for noise in noises(matrices) if noise is not None]
    return torch.stack(known).square().sum(0).sqrt() if known else None


def _roundings(matrices: Sequence[LowRank]) -> Tensor | None:
    """Of all columns; those that count as exact have none."""
    if all(m.rounding is None for m in matrices):
        return None
    return torch.cat([_zeros(m) if m.rounding is None else m.rounding for m in matrices], -1)


def _zeros(matrix: LowRank) -> Tensor:
    left = matrix.left
    return torch.zeros(*left.shape[:-2], left.shape[-1], dtype=torch.float64, device=left.device)


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
