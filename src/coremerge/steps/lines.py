"""LiNeS: the deeper a layer, the more of the merge it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from coremerge.layered import at
from coremerge.lowrank import LowRank, Matrix, ThinSVD, thin_svd
from coremerge.methods import Site
from coremerge.steps import STEPS, Beside, Step

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@STEPS.register("lines", unitary=True, linear=True, source="LiNeS, arXiv 2410.17146")
def lines(alpha: Strength = 0.5, beta: Strength = 1.0) -> Step:
    """After merging: layer l of L is multiplied by alpha + beta · l / (L − 1), a module outside of layers by alpha.

    L − 1 is the highest number of a layer among the adapters' modules. The overall scale comes on top: with ``auto``,
    which brings the whole merge to its inputs' size, only beta / alpha counts. The defaults are ours, not tuned: 1 on
    average over the layers, so that a scale keeps its meaning, and three times as much in the last as in the first.
    The paper's merge of T tasks is ``sum`` at scale 1 with alpha = 1/T and beta searched between 0 and 1.

    Choose it where a merge forgets what the base can do, or tasks share what is early and differ in what is late. Not
    where the adapters' early layers are what a task needs, nor for two towers whose layers are numbered each by itself.
    List it last: ``svc`` after it brings a direction back to the strength that the adapters have.

    Args:
        alpha: of the first layer.
        beta: what the last has more.
    """

    def apply(merged: Matrix, cores: Sequence[LowRank], site: Site) -> ThinSVD:
        svd = thin_svd(merged)
        found = [at((alpha, alpha + beta), module, site.last, "lines") for module in site.modules]
        factors = svd.values.new_tensor(found if svd.values.ndim > 1 else found[0]).unsqueeze(-1)
        noise = None if svd.noise is None else svd.noise * factors
        return replace(svd, values=svd.values * factors, noise=noise)

    return Beside(apply)
