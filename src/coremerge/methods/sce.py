"""SCE: select the entries that differ most between tasks, calculate each task's weight, erase what goes another way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site
from coremerge.methods.ties import VOTE, Errors, entries, errors_of, sum_beyond, trim_each, variance_of
from coremerge.registry import Values


def _selects(values: Values) -> list[str]:
    share = values["select_topk"]
    most = f"the entries of the cores that differ most between adapters, a share of {share:g}, and of them "
    return [f"keeps {most if share < 1 else ''}one sign"]


@METHODS.register(
    "sce",
    elementwise=True,
    source="SCE of FuseChat, arXiv 2408.07990, as in mergekit",
    cuts=_selects,
)
def sce(select_topk: Annotated[float, Field(gt=0, le=1)] = 1.0) -> Method:
    """A mean of the entries that vary most between tasks, each task weighed by how large it is there.

    Of each entry the variance over tasks; the share ``select_topk`` of those that vary is selected. A task's weight is
    its share of the squares of what is selected. Entries against the sign of the sum are erased, and the weights of the
    others divided by their sum, entry by entry. Choose it as mergekit's ``sce``, with adapters of like size; not where
    one is much larger, as weights go by squares and the others then hardly count.

    What rounding made of the stored numbers neither varies nor votes.

    Args:
        select_topk: the share of varying entries that is selected, in (0, 1]; the paper takes 0.1. Where nothing
            varies, all stay.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        errors = errors_of(cores)
        x = trim_each(entries(cores), errors)
        if select_topk < 1:
            x.masked_fill_(~_selected(x, errors, select_topk), 0.0)
        sizes = x.square().sum((-2, -1), keepdim=True)
        whole = sizes.sum(0)
        sign = sum_beyond(x, errors).sign_()
        merged, total = torch.zeros_like(sign), torch.zeros_like(sign)
        for one, size in zip(x, sizes, strict=True):
            weight = torch.where(whole > 0, size / whole, 0.0) * ((one.sign() == sign) & (one != 0))
            merged += weight * one
            total += weight
        return merged.div_(torch.where(total > 0, total, 1.0))

    return merge


def _selected(x: Tensor, errors: Errors, share: float) -> Tensor:
    """Which entries (..., p, q) of ``x`` (T, ..., p, q) vary most over T: a share of those that vary, one at least.

    Those that vary no more than their errors do not; where that is all of them, all are selected.
    """
    variance = x.var(0, correction=0)
    if (noise := variance_of(x, errors)) is not None:
        variance.masked_fill_(variance <= VOTE**2 * noise / len(x), 0.0)
    flat = variance.flatten(-2)
    count = (flat > 0).sum(-1)
    keep = (share * count).long().clamp_min(1)  # rounded down, as in mergekit
    order = flat.sort(dim=-1, descending=True).values
    least = order.gather(-1, (keep - 1).unsqueeze(-1)) if flat.shape[-1] else flat.new_zeros(*flat.shape[:-1], 1)
    return (variance >= least.unsqueeze(-1)) & (variance > 0) | (count == 0)[..., None, None]
