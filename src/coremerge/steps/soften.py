"""Bring singular values nearer to each other: between what they are and one for all."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coremerge.lowrank import Matrix, ThinSVD, thin_svd
from coremerge.steps import STEPS, After, Step


@STEPS.register("soften", unitary=True, source="ours; p = 0 is Iso-C, arXiv 2502.04959", flattens=True)
def soften(p: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Step:
    """After merging: singular values to the power p, their sum as before, X = P S Qᵀ → P Sᵖ Qᵀ · tr S / tr Sᵖ.

    Over the numerical rank, as in ``isotropize``.

    Args:
        p: 1 leaves them as they are, 0 makes them all equal.
    """

    def apply(core: Matrix) -> Matrix:
        if p == 1:
            return core
        svd = thin_svd(core).significant()
        if svd.values.shape[-1] == 0:
            return svd
        softer = (svd.values / svd.values.amax(-1, keepdim=True)).pow(p)
        return ThinSVD(svd.left, softer * (svd.values.sum(-1) / softer.sum(-1)).unsqueeze(-1), svd.right, svd.noise)

    return After(apply)
