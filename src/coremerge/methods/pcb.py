"""PCB: entries compete within each task and between tasks; those that win are averaged by how far they win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site, of_task, shown
from coremerge.methods.ties import Densities, entries, errors_of, sum_beyond, trim_each
from coremerge.registry import Values

NEAR = 1e-12
"""A score that is above the first that is dropped by no more than this share of it is as large as that."""


def _wins(values: Values) -> list[str]:
    clipped = f", the largest {values['clip']:g} of all lowered to the next" if values["clip"] else ""
    share = shown(values["density"])
    return [f"keeps the entries of each adapter's core that win the competition, a share of {share}{clipped}"]


@METHODS.register(
    "pcb",
    elementwise=True,
    source="PCB-Merging, arXiv 2410.02396, in the form of its published code",
    cuts=_wins,
    neutral={"density": 1.0, "clip": 0.0},
)
def pcb(density: Densities = 0.1, clip: Annotated[float, Field(ge=0, lt=1)] = 1e-4) -> Method:
    """Average entries that are large in their task and go the way of the sum, weighed by how much they are both.

    An entry x of X_t has the score exp(T · (x / max |X_t|)²) · x · (Σ_s X_s), T being the tasks that are not zero here.
    Those above the first score that is dropped, or above 0, have a weight of what is between, over what the highest
    has; the result is the weighted mean of the entries. Choose it as a published baseline, where few entries of each
    task matter; not where tasks need their many small entries, as all others are dropped.

    The published code does this over the whole model, here it is module by module; it takes tanh of x · Σ X_s, which
    changes next to nothing at the sizes that entries have (1e-2 and less) and would make the result depend on scale.
    Weights count in the competition, too.

    Args:
        density: the share of entries of each core that is kept, in (0, 1], its ``pcb_ratio``; or a list, one for each
            adapter.
        clip: the share of each core's largest entries that are first lowered to the size of the next, so that outliers
            do not win alone; none of a core of less than half its inverse.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        errors = errors_of(cores)
        x = trim_each(entries(cores), errors)  # what rounding made does not compete
        whole = _over_largest(sum_beyond(x, errors))
        rivals = torch.stack([one.flatten(-2).any(-1) for one in x]).sum(0).to(x)[..., None, None]
        merged, total = torch.zeros_like(whole), torch.zeros_like(whole)
        for t, one in enumerate(x):
            share = _over_largest(one)
            one.copy_(_clipped(one, clip))
            score = (rivals * (_over_largest(one).square() - 1)).exp_().mul_(share).mul_(whole)
            weight = _weights(score, of_task(density, t, site))
            merged += weight * one
            total += weight
        return merged.div_(torch.where(total > 0, total, 1.0))

    return merge


def _over_largest(x: Tensor) -> Tensor:
    """``x`` (..., p, q) over its largest magnitude: what follows does not depend on scale."""
    if not x.numel():
        return x
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, x / largest, 0.0)


def _clipped(x: Tensor, share: float) -> Tensor:
    """``x`` (..., p, q) with the largest magnitudes, a ``share`` of them, lowered to that of the next."""
    size = x.shape[-2] * x.shape[-1]
    count = min(round(share * size), size - 1)
    if count <= 0:
        return x
    most = x.abs().flatten(-2).kthvalue(size - count, dim=-1).values[..., None, None]
    return x.clamp(-most, most)


def _weights(scores: Tensor, density: float) -> Tensor:
    """How far ``scores`` (..., p, q) are above the first that is dropped, over what the highest is: in [0, 1]."""
    size = scores.shape[-2] * scores.shape[-1]
    keep = max(1, round(density * size))
    if not size:
        return scores
    flat = scores.flatten(-2)
    least = flat.kthvalue(size - keep, dim=-1).values.clamp_min(0) if keep < size else torch.zeros_like(flat[..., 0])
    least = least[..., None, None]
    above = (scores - least).masked_fill(scores <= least * (1 + NEAR), 0.0)
    highest = above.amax((-2, -1), keepdim=True)
    return torch.where(highest > 0, above / highest, 0.0)
