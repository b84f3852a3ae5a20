"""The linear algebra of the package: the only file that calls ``torch.linalg``.

All functions take real floating tensors with any leading batch dimensions and never change them.
A numerical rank must be the same over the whole batch; where it is not, :class:`RaggedRankError` says so
and the caller goes on one matrix at a time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

RTOL = 1e-8
"""Singular values below ``RTOL`` times the largest one count as zero, unless the caller says otherwise."""

GRAM_CONDITION = 1e-6
"""A Gram matrix is used only where its smallest eigenvalue exceeds this share of its largest one.

The basis it gives is then orthonormal to about ``eps / GRAM_CONDITION`` = 2e-10 in float64."""

NOISE = 1e-12
"""What is lost below this share of a whole is rounding error, or does not show in it."""

LEAST_ROUNDING = 1e-10
"""Relative errors are taken to be at least this: decompositions in float64 do not tell smaller ones from their own."""

MARGIN = 2.0
"""A direction counts if it is so many times larger than the largest that rounding errors alone would show."""

LEVEL = 3.0
"""Singular values that are no more than so many times the noise are errors: :data:`MARGIN` times what the largest of a
random p × q matrix of rank r is, next to what it does to one direction: 1 + √(r/p), 1.5 for a quarter of the
dimensions."""

SQUARES = 2.0**900
"""A Gram matrix is used only where its largest entry lies between this and its inverse: what is smaller loses digits
below the smallest float64, what is larger may overflow."""


LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""A decomposition failed, as it does for numbers that are not finite."""


class RaggedRankError(Exception):
    """The matrices of one batch have different numerical ranks."""


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``x`` (..., m, n): left (..., m, k), values (..., k) descending, right (..., k, n)."""
    if 0 in x.shape[-2:]:
        return _empty_svd(x)
    try:
        return _thin(x)
    except LinAlgError:
        if not bool(x.isfinite().all()):
            raise
        return _svd_again(x)


def _thin(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    return left, values, right


def _svd_again(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the transpose, else after rotations: divide and conquer may fail where many singular values coincide."""
    with suppress(LinAlgError):
        left, values, right = _thin(x.mT)
        return right.mT, values, left.mT
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q.to(x) for n in x.shape[-2:])
    left, values, right = _thin(a @ x @ b)
    return a.mT @ left, values, right @ b.mT


def _empty_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *batch, m, n = x.shape
    return x.new_zeros(*batch, m, 0), x.new_zeros(*batch, 0), x.new_zeros(*batch, 0, n)


def numerical_rank(values: Tensor, rtol: float = RTOL, largest: Tensor | None = None) -> int:
    """How many of the descending ``values`` (..., k) exceed ``rtol`` times the ``largest`` (...): the first, if None.

    Raises:
        RaggedRankError: the batch elements disagree.
        LinAlgError: values that are not finite.
    """
    if values.shape[-1] == 0 or values.numel() == 0:
        return 0
    largest = values[..., 0] if largest is None else largest
    if not bool(largest.isfinite().all()):
        raise LinAlgError("singular values that are not finite")
    return one_rank((values > rtol * largest.unsqueeze(-1)).sum(-1))


def one_rank(counts: Tensor) -> int:
    """The one value of ``counts`` (...), of a batch.

    Raises:
        RaggedRankError: there are several.
    """
    rank = int(counts.max())
    if rank != int(counts.min()):
        raise RaggedRankError
    return rank


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``left @ right`` (..., m, r) (..., r, n) without forming the m × n product."""
    outer, inner_left = _tall_qr(left)
    other, inner_right = _tall_qr(right.mT)
    u, values, vh = svd(inner_left @ inner_right.mT)
    return (
        u if outer is None else outer @ u,
        values,
        vh if other is None else vh @ other.mT,
    )


def _tall_qr(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """``x = q @ r``; a wide or square ``x`` is its own ``r`` and has no ``q``."""
    if x.shape[-2] <= x.shape[-1]:
        return None, x
    q, r = torch.linalg.qr(x)
    return q, r


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of the symmetric ``x`` (..., n, n)."""
    values, vectors = torch.linalg.eigh(x)
    return values, vectors


def eigvalsh(x: Tensor) -> Tensor:
    """Eigenvalues (..., n), ascending, of the symmetric ``x`` (..., n, n)."""
    values: Tensor = torch.linalg.eigvalsh(x)
    return values


def top(values: Tensor) -> Tensor:
    """The largest (...) of ``values`` (..., k); 0 of none."""
    return values.amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def fading(values: Tensor, largest: Tensor, share: float) -> Tensor:
    """How much ``values`` (...) count beside the ``largest``: x² / (x² + ``share``²), x = values / largest.

    Nearly 1 of what is far above ``share``, ½ of what is as large, and less and less of what fades; 0 of nothing.
    """
    squares = torch.where(largest > 0, values / largest, 0.0).square()
    return squares / (squares + share**2)


def solve(x: Tensor, y: Tensor) -> Tensor:
    """``x``⁻¹ ``y`` of a square, regular ``x``."""
    found: Tensor = torch.linalg.solve(x, y)
    return found


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of ``x`` (..., m, n)."""
    q, r = torch.linalg.qr(x)
    return q, r


def polar(x: Tensor, rtol: float = RTOL, rounding: Tensor | None = None) -> tuple[Tensor, bool]:
    """The polar factor P Qᵀ of ``x`` = P S Qᵀ (..., m, n), over its numerical rank.

    ``rounding`` (..., n), if given, is the relative error of each column: what is no larger than that is no direction.

    Returns:
        The factor, and whether its columns are orthonormal: it is then the nearest such matrix to ``x``.
    """
    m, n = x.shape[-2:]
    if 0 in (m, n):
        return x, n == 0
    if rounding is not None and (above := basis_above_rounding(x, rounding)):
        inner, _ = polar(above.coordinates, rtol)
        return x @ (above.transform @ inner), False
    if n <= m:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        if _well_conditioned(values):
            return x @ ((vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT), True
    u, s, vh = svd(x)
    rank = numerical_rank(s, rtol)
    return u[..., :rank] @ vh[..., :rank, :], rank == n


def _well_conditioned(eigenvalues: Tensor) -> bool:
    return bool((eigenvalues[..., 0] > GRAM_CONDITION * eigenvalues[..., -1]).all())


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis U (..., m, p) of the columns of a stack X (..., m, R), kept small.

    Attributes:
        transform: C (..., R, p), so that U = X C.
        coordinates: Uᵀ X (..., p, R).
    """

    transform: Tensor
    coordinates: Tensor

    @property
    def rank(self) -> int:
        """The number p of basis vectors."""
        return self.transform.shape[-1]


def column_basis(
    stack: Tensor,
    rtol: float = RTOL,
    *,
    singular: bool = True,
    beside: Tensor | None = None,
    rounding: Tensor | None = None,
) -> Basis:
    """The left singular vectors of ``stack`` (..., m, R) whose singular values exceed ``rtol`` times the first.

    A well-conditioned stack needs its Gram matrix only; any other takes a QR and a small SVD; both in float64, whatever
    the dtype of ``stack``. The vectors themselves are not formed: see :class:`Basis`. Unless they have to be
    ``singular`` vectors, another orthonormal basis of their span is taken where it costs less.

    Column j of ``beside`` (..., n, R), if given, is what column j of ``stack`` is multiplied by: a small column may
    carry much of the product. Where the cut, or rounding, would lose more of it than :data:`NOISE`, and than ``rtol``²
    (what is lost where columns are as large as their partners), they are made as large as their partners beforehand.

    ``rounding`` (..., R), if given, is the relative error of each column: directions that are no larger than such
    errors are cut, too: see :func:`basis_above_rounding`.
    """
    stack = stack.double()
    gram = _gram(stack)
    if rounding is not None and (above := _above_rounding(stack, gram, rounding)):
        return _rotated(above)  # those of X̃ are arbitrary where columns are copies of each other
    basis, lost = _cut_basis(stack, gram, rtol, singular)
    if lost is None or beside is None:
        return basis
    own, other = (x.abs().amax(-2).double() for x in (stack, beside))
    if bool((lost * other <= max(NOISE, rtol**2) * (own * other).amax(-1, keepdim=True)).all()):
        return basis
    return _evened(stack, (other.log2() - own.log2()).nan_to_num(0, 0, 0), rtol, singular)


def basis_above_rounding(stack: Tensor, rounding: Tensor) -> Basis | None:
    """An orthonormal basis of what ``stack`` (..., m, R) has beside rounding errors; None: that is all of it.

    Column j is known to a relative error of ``rounding`` (..., R), in the mean. Divided by their errors, the columns
    are X̃ with noise of norm 1 in each; the largest singular value of such noise alone is about 1 + √(R/m)
    (Marchenko and Pastur). A direction of X̃ counts if it is :data:`MARGIN` times larger than that.

    Raises:
        RaggedRankError: the batch elements disagree.
        LinAlgError: columns that are not finite.
    """
    stack = stack.double()
    return _above_rounding(stack, _gram(stack), rounding)


def above_rounding(stack: Tensor, rounding: Tensor | None) -> Tensor:
    """``stack`` (..., m, R), in float64, without its directions that are rounding errors."""
    stack = stack.double()
    basis = None if rounding is None else basis_above_rounding(stack, rounding)
    return stack if basis is None else stack @ (basis.transform @ basis.coordinates)


def _above_rounding(stack: Tensor, gram: Tensor | None, rounding: Tensor) -> Basis | None:
    m, width = stack.shape[-2:]
    if 0 in stack.shape:
        return None
    sizes = column_norms(stack) if gram is None else gram.diagonal(dim1=-2, dim2=-1).sqrt()
    errors = rounding.to(stack).clamp_min(LEAST_ROUNDING) * sizes
    scale = torch.where(errors > 0, 1 / errors, 0.0)
    level = MARGIN * (1 + (width / m) ** 0.5)
    if gram is not None and _is_above(gram * (scale.unsqueeze(-1) * scale.unsqueeze(-2)), level):
        return None
    _, small = _tall_qr(stack * scale.unsqueeze(-2))
    _, sigma, vh = svd(small)
    most = (errors > 0).sum(-1).clamp_max(m)
    if not bool(sigma.isfinite().all()):
        raise LinAlgError("columns that are not finite")
    counts = (sigma > level).sum(-1)
    if bool((counts == most).all()):
        return None
    rank = one_rank(counts)
    values, right = sigma[..., :rank], vh[..., :rank, :]
    transform = scale.unsqueeze(-1) * right.mT / values.unsqueeze(-2)
    return Basis(transform, values.unsqueeze(-1) * right * errors.unsqueeze(-2))


def _is_above(gram: Tensor, level: float) -> bool:
    """Whether all singular values of X exceed ``level``: with ``gram`` = XᵀX = R Rᵀ they are at least 1/‖R⁻¹‖_F.

    Where the Gram matrix is too ill-conditioned to tell, they are not said to.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return False
    inverse = torch.linalg.solve_triangular(factor, torch.eye(gram.shape[-1]).to(gram).expand_as(gram), upper=False)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return bool((inverse.square().sum((-2, -1)) * (level**2 + GRAM_CONDITION * trace) < 1).all())


def column_norms(x: Tensor) -> Tensor:
    """Norms (..., R) of the columns, safe where squares would overflow."""
    if not x.numel():
        return x.new_zeros(*x.shape[:-2], x.shape[-1])
    largest = x.abs().amax(-2, keepdim=True)
    unit = torch.where(largest > 0, x / largest, 0.0)
    return unit.square().sum(-2).sqrt() * largest.squeeze(-2)


def _gram(stack: Tensor) -> Tensor | None:
    """``stack``ᵀ ``stack``, where it is smaller than the stack and holds its squares."""
    m, width = stack.shape[-2:]
    if 0 in stack.shape or width > m:
        return None
    gram = stack.mT @ stack
    return gram if _squares(gram) else None


def _evened(stack: Tensor, octaves: Tensor, rtol: float, singular: bool) -> Basis:
    """From ``stack`` with its columns times 2^½``octaves`` (..., R): the same span, of which other parts are small."""
    scale = (octaves / 2).round().exp2()
    evened = stack * scale.unsqueeze(-2)
    basis, _ = _cut_basis(evened, _gram(evened), rtol, singular)
    even = Basis(scale.unsqueeze(-1) * basis.transform, basis.coordinates / scale.unsqueeze(-2))
    return _rotated(even) if singular else even


def _rotated(basis: Basis) -> Basis:
    """The singular vectors of the same span."""
    vectors, _, _ = svd(basis.coordinates)
    return Basis(basis.transform @ vectors, vectors.mT @ basis.coordinates)


def _cut_basis(stack: Tensor, gram: Tensor | None, rtol: float, singular: bool) -> tuple[Basis, Tensor | None]:
    """The basis, and what (..., R) each column at most lost to the cut or to rounding; None: next to nothing."""
    width = stack.shape[-1]
    if 0 in stack.shape:
        empty = stack.new_zeros(*stack.shape[:-2], width, 0)
        return Basis(empty, empty.mT), None
    if gram is not None:
        triangular = None if singular else _triangular_basis(gram)
        if triangular is not None:
            return triangular, None
        values, vectors = torch.linalg.eigh(gram)
        if _well_conditioned(values):
            sigma, vectors = values.flip(-1).sqrt(), vectors.flip(-1)
            return _basis(sigma, vectors), None
    _, small = _tall_qr(stack)
    _, sigma, vh = svd(small)
    rank = numerical_rank(sigma, rtol)
    something = (small != 0).any(-2).unsqueeze(-1)  # a zero column keeps coordinates of zero, not of 1e-17
    rest = sigma[..., rank:, None] * vh[..., rank:, :]
    lost = rest.abs().sum(-2) + torch.finfo(sigma.dtype).eps * sigma[..., :1]
    return _basis(sigma[..., :rank], vh[..., :rank, :].mT * something), lost


def _squares(gram: Tensor) -> bool:
    """Whether no entry that counts was lost when ``gram`` was multiplied out."""
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    return bool(((largest > 1 / SQUARES) & (largest < SQUARES)).all())


def _triangular_basis(gram: Tensor) -> Basis | None:
    """From X = Q R, R by Cholesky: C = R⁻¹ and Qᵀ X = R; None where X may be ill-conditioned."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return None
    right = factor.mT
    inverse = torch.linalg.solve_triangular(right, torch.eye(gram.shape[-1]).to(gram).expand_as(gram), upper=True)
    condition = right.square().sum((-2, -1)) * inverse.square().sum((-2, -1))  # at least that of the Gram matrix
    return Basis(inverse, right) if bool((condition * GRAM_CONDITION < 1).all()) else None


def _basis(sigma: Tensor, right: Tensor) -> Basis:
    """From X = U Σ Wᵀ: C = W Σ⁻¹ and Uᵀ X = Σ Wᵀ."""
    return Basis(right / sigma.unsqueeze(-2), sigma.unsqueeze(-1) * right.mT)
