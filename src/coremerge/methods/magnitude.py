"""Magnitude pruning and Breadcrumbs: drop each task's small entries, or its largest, too, and sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site, of_task, shown
from coremerge.methods.ties import (
    Densities,
    Rates,
    Reduce,
    Trim,
    check_trim,
    entries,
    errors_of,
    kept,
    survey_of,
    trim_each,
    trimmed,
)
from coremerge.methods.ties import elect as elect_signs
from coremerge.registry import Values


@METHODS.register(
    "magnitude",
    elementwise=True,
    source="magnitude pruning, as PEFT's magnitude_prune",
    cuts=lambda values: [kept(values)],
    neutral={"density": 1.0},
    surveys=survey_of,
)
def magnitude(density: Densities = 0.5, trim: Trim = "module") -> Method:
    """Keep each task's largest entries and sum them: TIES without its election of signs.

    Args:
        density: the share of entries of each core that is kept, in (0, 1]; or a list, one for each adapter.
        trim: within each ``module`` or the whole ``model``, as in ``ties``.
    """
    check_trim(density, trim)

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        return trimmed(entries(cores), errors_of(cores), density, trim, site).sum(0)

    return merge


def _middle(values: Values) -> list[str]:
    return [
        f"keeps a share of {shown(values['density'])} of each adapter's core: without the largest"
        f" {shown(values['gamma'])}, and without the smallest"
    ]


@METHODS.register(
    "breadcrumbs",
    elementwise=True,
    source="Model Breadcrumbs, arXiv 2312.06795",
    cuts=_middle,
    neutral={"density": 1.0, "gamma": 0.0},
)
def breadcrumbs(
    density: Densities = 0.9,
    gamma: Rates = 0.01,
    elect: bool = False,
    reduce: Reduce = "mean",
) -> Method:
    """Drop each task's largest entries, then its smallest, and sum what is left.

    Args:
        density: the share of entries of each core that is kept, in (0, 1]; or a list, one for each adapter.
        gamma: the share of the largest that is dropped; less where ``density`` leaves less to drop; or a list.
        elect: merge as TIES does: the sign of the sum alone (mergekit's ``breadcrumbs_ties``).
        reduce: with ``elect``, ``mean`` over the agreeing entries, or their ``sum``.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        x, errors = entries(cores), errors_of(cores)
        for t, one in enumerate(x):
            one.copy_(_without_largest(one, of_task(density, t, site), of_task(gamma, t, site)))
        trim_each(x, errors, density, site)
        return elect_signs(x, reduce, errors) if elect else x.sum(0)

    return merge


def _without_largest(x: Tensor, density: float, gamma: float) -> Tensor:
    """``x`` (..., p, q) with its ⌈gamma · p · q⌋ entries of largest magnitude set to zero, in each matrix."""
    size = x.shape[-2] * x.shape[-1]
    drop = min(round(gamma * size), size - max(1, round(density * size))) if size else 0
    if not drop:
        return x
    magnitude = x.abs()
    largest = magnitude.flatten(-2).kthvalue(size - drop, dim=-1).values
    return x.masked_fill(magnitude > largest[..., None, None], 0.0)
