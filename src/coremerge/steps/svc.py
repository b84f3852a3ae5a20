"""SVC: a direction that several adapters share is not counted several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.linalg import column_norms, fading
from coremerge.lowrank import LowRank, Matrix, ThinSVD, thin_svd
from coremerge.methods import Site
from coremerge.steps import STEPS, Beside, Step

FAINT = 0.01
"""Of the strongest row u_rᵀX_t: an adapter whose own is as strong as this has half a say, and one that fades none.

By the paper's formula it would have a say like any other, and s_t is large where a row is faint: what it hardly has
would be held down for all. Not tuned: the least that is well above the rounding of stored numbers."""


@STEPS.register(
    "svc", unitary=True, lifts=True, source="SVC, arXiv 2602.05536; an adapter has no say along what it does not write"
)
def svc(alpha: Annotated[float, Field(gt=0, le=1)] | None = None) -> Step:
    """After merging: singular values such that a direction is as strong as the adapters have it, not as their sum.

    X = Σ σ_r u_r v_rᵀ → Σ γ_r σ_r u_r v_rᵀ, γ_r = Σ_t d_t / Σ_t d_t max(α, s_t), s_t = ⟨u_rᵀX, u_rᵀX_t⟩ / ‖u_rᵀX_t‖².
    With d_t = 1 it is the paper's; here d_t = (1 + f²) x² / (x² + f²), x = ‖u_rᵀX_t‖ over the largest of these,
    f = 0.01. X is what the method gave, before the overall scale; the X_t are weighted, as they were merged.

    Choose it where what all adapters have in common rules their sum. Not for adapters of quite different sizes, as a
    small one then weighs most: give ``--norms equal``, too.

    Args:
        alpha: what a ratio s_t counts at least. 1 only ever weakens a direction; by default 1/T, T = Σ_t d_t, which
            strengthens those that adapters contradict each other in.
    """

    def apply(merged: Matrix, cores: Sequence[LowRank], site: Site) -> ThinSVD:
        svd = thin_svd(merged).significant()
        if svd.values.shape[-1] == 0:
            return svd
        sizes, ratios = (torch.stack(each) for each in zip(*(_along(svd, core) for core in cores), strict=True))
        says = (1 + FAINT**2) * fading(sizes, sizes.amax(0), FAINT)
        count = says.sum(0)
        least = 1 / count.clamp_min(1) if alpha is None else count.new_tensor(alpha)
        whole = torch.where(says > 0, says * ratios.maximum(least), 0.0).sum(0)
        factors = torch.where(count > 0, count / whole, 1.0)
        noise = None if svd.noise is None else svd.noise * factors
        return replace(svd, values=svd.values * factors, noise=noise)

    return Beside(apply)


def _along(svd: ThinSVD, core: LowRank) -> tuple[Tensor, Tensor]:
    """‖u_rᵀX_t‖ and s_t (..., k) of one adapter."""
    rows = (svd.left.mT @ core.left) @ core.right
    sizes = column_norms(rows.mT)
    safe = torch.where(sizes > 0, sizes, 1.0)
    return sizes, svd.values / safe * (svd.right * (rows / safe.unsqueeze(-1))).sum(-1)
