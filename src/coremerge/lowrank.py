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

    def noise_along(self, left: Tensor, right: Tensor) -> Tensor | None:
        """How far (..., k) the errors of the stored numbers move directions of the product; None: they are exact.

        Column j of ``left`` is off by a random vector of norm ρ_j‖left_j‖, ρ the :attr:`rounding`; so the product is
        off by ‖diag(ρ_j‖left_j‖) right v‖ at a unit vector v, and likewise on the other side. Where an adapter does
        not write, its errors move nothing, however large they are.

        Args:
            left: (..., m, k), unit columns u_i.
            right: (..., k, n), unit rows v_i.
        """
        if self.rounding is None:
            return None
        own = self.left.to(left.dtype), self.right.to(left.dtype)
        sizes = self.rounding * linalg.column_norms(own[0]), self.rounding * linalg.column_norms(own[1].mT)
        errors = sizes[0].unsqueeze(-1) * (own[1] @ right.mT), sizes[1].unsqueeze(-1) * (own[0].mT @ left)
        return torch.hypot(*(linalg.column_norms(side) for side in errors))

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
        left, values, right = linalg.product_svd(self.left, self.right)
        return ThinSVD(left, values, right, self.noise_along(left, right))

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
        return replace(svd, values=torch.where(svd.values > linalg.LEVEL * svd.noise, svd.values, 0.0)).lowrank()

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of rank at most ``rank`` (Eckart–Young), balanced."""
        return self.svd.truncate(rank).lowrank()


@dataclass(frozen=True, eq=False)
class ThinSVD:
    """left · diag(values) · right, ``left`` (..., m, k) and ``right`` (..., k, n) orthonormal, values in any order.

    ``noise`` (..., k): how far the errors of the stored numbers move each direction: see :meth:`LowRank.noise_along`.
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
        return self.significant(rtol).values.shape[-1]

    @property
    def descending(self) -> ThinSVD:
        """The same with its values in descending order."""
        if bool((self.values[..., 1:] <= self.values[..., :-1]).all()):
            return self
        return self._at(self.values.argsort(dim=-1, descending=True, stable=True))

    def _at(self, order: Tensor) -> ThinSVD:
        """The components of those numbers (..., k)."""
        return ThinSVD(
            self.left.gather(-1, order.unsqueeze(-2).expand(*self.left.shape[:-1], order.shape[-1])),
            self.values.gather(-1, order),
            self.right.gather(-2, order.unsqueeze(-1).expand(*order.shape, self.right.shape[-1])),
            None if self.noise is None else self.noise.gather(-1, order),
        )

    def truncate(self, rank: int) -> ThinSVD:
        """The largest ``rank`` components, in descending order."""
        return self.descending._first(rank)

    def cut(self, rtol: float = linalg.RTOL) -> ThinSVD:
        """Only the components that are not zero: above ``rtol`` times the largest."""
        best = self.descending
        return best._first(linalg.numerical_rank(best.values, rtol))

    def significant(self, rtol: float = linalg.RTOL, largest: Tensor | None = None) -> ThinSVD:
        """Only the components that are directions: above their noise, and ``rtol`` times the ``largest`` (...)."""
        best = self.descending
        if best.noise is None or not best.values.numel():
            return best._first(linalg.numerical_rank(best.values, rtol, largest))
        above = best.values > linalg.LEVEL * best.noise.to(best.values)
        values = torch.where(above, best.values, 0.0)
        order = values.argsort(dim=-1, descending=True, stable=True)
        count = linalg.numerical_rank(
            values.gather(-1, order), rtol, best.values[..., 0] if largest is None else largest
        )
        return best._first(count) if bool(above[..., :count].all()) else best._at(order[..., :count])

    def _first(self, count: int) -> ThinSVD:
        if count >= self.values.shape[-1]:
            return self
        noise = None if self.noise is None else self.noise[..., :count]
        return ThinSVD(self.left[..., :count], self.values[..., :count], self.right[..., :count, :], noise)

    def lowrank(self) -> LowRank:
        """As balanced factors U√S and √S Vᵀ; the noise moves u_i and v_i by its share of σ_i."""
        root = self.values.sqrt()
        return LowRank(self.left * root.unsqueeze(-2), root.unsqueeze(-1) * self.right, self._rounding)

    @property
    def _rounding(self) -> Tensor | None:
        if self.noise is None:
            return None
        return torch.where(self.values > 0, self.noise / self.values / 2**0.5, 0.0)

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
    together = _together(matrices)
    if together is not None:
        u, values, vh = linalg.product_svd(together.left, together.right)
        noise = together.noise_along(u, vh)
        for i, matrix in enumerate(matrices):
            vars(matrix)["svd"] = ThinSVD(u[i], values[i], vh[i], None if noise is None else noise[i])
    return [matrix.svd for matrix in matrices]


def _together(matrices: Sequence[LowRank]) -> LowRank | None:
    """All in one batch, if that is possible, and none is decomposed already."""
    first = matrices[0]
    alike = all(m.left.shape == first.left.shape and m.right.shape == first.right.shape for m in matrices)
    if len(matrices) < 2 or not alike or any("svd" in vars(m) for m in matrices):
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


def inner_products(stack: LowRank, ranks: Sequence[int]) -> Tensor:
    """(..., T, T) Frobenius inner products of matrices whose factors, of ``ranks``, are side by side in ``stack``."""
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    member = (owner == torch.arange(len(ranks)).unsqueeze(-1)).to(stack.left)
    grams: Tensor = (stack.left.mT @ stack.left) * (stack.right @ stack.right.mT)
    return member @ grams @ member.mT
