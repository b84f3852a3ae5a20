"""Whitening: each adapter's directions, made orthogonal to those of the others where both are strong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.language import generates
from coremerge.linalg import fading, polar, top
from coremerge.lowrank import LowRank, Matrix, ThinSVD, inner_products, svds, thin_svd
from coremerge.methods import METHODS, Method, Site

if TYPE_CHECKING:
    from coremerge.adapter import Adapter

RIDGE = 0.03
"""Chosen on validation rows of four worlds, where .003 to .03 are alike, and .5 is half-way to the plain sum."""

EVEN = 0.97
"""Of adapters of language models that generate: see :func:`_even_for`."""


def _even_for(adapters: Mapping[str, Adapter]) -> tuple[float, str]:
    """How even the strengths become, and why; chosen on validation rows of four worlds."""
    if any(map(generates, adapters.values())):
        return EVEN, "as the adapters are of a language model that generates (CAUSAL_LM)"
    return 0.0, "as no adapter says that it is of a language model that generates (CAUSAL_LM)"


@METHODS.register(
    "whiten",
    unitary=True,
    continuous=True,
    settles={"even": _even_for},
    group="when in doubt",
    source="ours: TSV, arXiv 2412.00081, weighted by singular values and with a ridge, so that it is continuous",
)
def whiten(
    ridge: Annotated[float, Field(gt=0)] = RIDGE, even: Annotated[float, Field(ge=0, lt=1)] | None = None
) -> Method:
    """Put the tasks' singular vectors side by side, whiten each stack with a ridge, multiply back.

    X_t = U_t S_t V_tᵀ → X = W(U) · S · W(V)ᵀ, where U, S and V are side by side,
    W(U) = √(1 + ridge) · B (BᵀB + ridge·D)^-½ with B = U √D, D = d(σ/σ_t) · d(σ_t/max σ), σ_t the largest of X_t and
    d(x) = x² / (x² + FAINT²). Then the singular values of X become σ / (1 − e·(1 − σ/σ₁)): with e = ``even`` where two
    or more different updates meet, and less the more alike they are, down to 0 for copies.

    Directions that no other adapter has stay where they are; those that several share are not counted several times;
    a small change of an adapter is a small change of the result. Nothing is cut.

    Args:
        ridge: how different directions must be to be told apart; near 0 it is a weighted TSV, large it is the sum.
        even: how near the strengths of directions come to each other: 0 leaves them as they are, near 1 all that are
            not faint become the same; by default 0.97 for adapters of language models that generate, else 0.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Matrix:
        parts = svds(cores)
        left, right = torch.cat([part.left for part in parts], -1), torch.cat([part.right for part in parts], -2)
        values = torch.cat([part.values for part in parts], -1)
        if values.shape[-1] == 0:
            return LowRank(left, right)
        weights = _weights([part.values for part in parts])
        whitened = LowRank(
            _whitened(left, weights, ridge) * values.unsqueeze(-2), _whitened(right.mT, weights, ridge).mT
        )
        if not even:
            return whitened
        inner = inner_products(LowRank(left * values.unsqueeze(-2), right), [part.values.shape[-1] for part in parts])
        return _evened(thin_svd(whitened), even * _different(inner))

    return merge


def _different(inner: Tensor) -> Tensor:
    """0 where updates are copies of each other, or there is one, up to 1 where they count for two or more.

    Of their inner products G (..., T, T): (tr G)² / ‖G‖² is how many orthogonal updates of one size are as different.
    """
    largest = inner.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    inner = torch.where(largest > 0, inner / largest, 0.0)
    squares = inner.square().sum((-2, -1))
    count = inner.diagonal(dim1=-2, dim2=-1).sum(-1).square() / torch.where(squares > 0, squares, 1.0)
    return (2 * (1 - 1 / count.clamp_min(1))).clamp_max(1)


def _evened(svd: ThinSVD, even: Tensor) -> ThinSVD:
    """σ → σ / (1 − e·(1 − σ/σ₁)), e (...)."""
    largest = svd.values.amax(-1, keepdim=True)
    parts = torch.where(largest > 0, svd.values / largest, 0.0)
    return replace(svd, values=svd.values / (1 - even.unsqueeze(-1) * (1 - parts)))


FAINT = 0.03
"""Of an update's largest singular value, and of the largest of all updates: a direction as strong as this has half a
say in what the others become, and one that fades has less and less. .03 was the best of .03, .05, .1 and .3 on
validation rows of eight vision tasks; elsewhere they were alike."""


def _weights(spectra: Sequence[Tensor]) -> Tensor:
    """D (..., R) of the updates' singular values (..., r_t): alike in copies of one update, but for a factor."""
    tops = torch.stack([top(values) for values in spectra], -1)
    says = fading(tops, top(tops).unsqueeze(-1), FAINT)
    return torch.cat([fading(v, tops[..., t, None], FAINT) * says[..., t, None] for t, v in enumerate(spectra)], -1)


def _whitened(vectors: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """W of unit ``vectors`` (..., p, R) with ``weights`` D (..., R).

    It is the upper p rows of the polar factor of B on top of √(ridge·D), times √(1 + ridge).
    """
    roots = weights.sqrt()
    stack = torch.cat([vectors * roots.unsqueeze(-2), torch.diag_embed(math.sqrt(ridge) * roots)], -2)
    return math.sqrt(1 + ridge) * polar(stack)[0].narrow(-2, 0, vectors.shape[-2])
