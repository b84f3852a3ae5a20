"""SCE: entries that differ between tasks, weighed by each task's size there, without those against the majority."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site
from coremerge.methods.ties import Density, entries, least_of, trim
from coremerge.registry import Values


def _selects(values: Values) -> list[str]:
    share = values["select"]
    return [f"keeps the entries of the cores that differ most between adapters, a share of {share:g}, and one sign"]


@METHODS.register(
    "sce", elementwise=True, source="SCE of FuseChat, arXiv 2408.07990", cuts=_selects, neutral={"select": 1.0}
)
def sce(select: Density = 0.1) -> Method:
    """Select, calculate, erase: a weighted mean over tasks of the entries that vary most between them.

    Of each entry the variance over tasks; the largest share ``select`` is kept. A task's weight is its share of the
    squares of what is kept. Entries against the sign of the sum are erased, and the weights of the others are divided
    by their sum, entry by entry.

    Args:
        select: the share of entries that is kept, in (0, 1]; all where it is 1.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        x = entries(cores)
        for one, core in zip(x, cores, strict=True):
            one.copy_(trim(one, 1.0, least_of(core)))  # what rounding made has no sign
        if select < 1 and len(x) > 1:
            x.masked_fill_(trim(x.var(0, correction=0), select) == 0, 0.0)
        sizes = x.square().sum((-2, -1), keepdim=True)
        weights = sizes / sizes.sum(0).clamp_min(torch.finfo(x.dtype).tiny)
        agree = (x.sign() == x.sum(0).sign()).logical_and_(x != 0)
        total = (weights * agree).sum(0)
        return (weights * agree * x).sum(0) / torch.where(total > 0, total, 1.0)

    return merge
