"""Iso-C: one singular value for all directions."""

from __future__ import annotations

from coremerge.lowrank import Matrix, ThinSVD, dense, thin_svd
from coremerge.steps import STEPS, After, Step


@STEPS.register("isotropize", unitary=True, source="Iso-C, arXiv 2502.04959")
def isotropize(span: bool = True) -> Step:
    """After merging: every singular value becomes their mean, X = P S Qᵀ → mean(S) · P Qᵀ.

    Args:
        span: over the numerical rank; ``false``: over all min(p, q) directions, zero ones included, as the published
            full-space code does.
    """

    def apply(core: Matrix) -> ThinSVD:
        svd = thin_svd(core).cut() if span else thin_svd(dense(core))
        if svd.values.shape[-1] == 0:
            return svd
        flat = svd.values.mean(-1, keepdim=True).expand_as(svd.values)
        return ThinSVD(svd.left, flat, svd.right)

    return After(apply)
