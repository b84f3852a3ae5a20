"""Iso-C: one singular value for all directions."""

from __future__ import annotations

from coremerge.lowrank import Matrix, ThinSVD, thin_svd
from coremerge.steps import STEPS, After, Step


@STEPS.register(
    "isotropize",
    unitary=True,
    source="Iso-C, arXiv 2502.04959",
    dense=lambda values: not values["span"],
    spreads=lambda values: not values["span"],
    flattens=True,
)
def isotropize(span: bool = True) -> Step:
    """After merging: every singular value becomes their mean, X = P S Qᵀ → mean(S) · P Qᵀ.

    Args:
        span: over the numerical rank, judged by the precision of the stored numbers; ``false``: over all min(p, q)
            directions, zero ones included, as the published full-space code does.
    """

    def apply(core: Matrix) -> ThinSVD:
        svd = thin_svd(core).significant() if span else _all_directions(thin_svd(core))
        if svd.values.shape[-1] == 0:
            return svd
        flat = svd.values.mean(-1, keepdim=True).expand_as(svd.values)
        return ThinSVD(svd.left, flat, svd.right, svd.noise)

    return After(apply)


def _all_directions(svd: ThinSVD) -> ThinSVD:
    return svd if svd.values.shape[-1] == min(svd.shape) else thin_svd(svd.dense())
