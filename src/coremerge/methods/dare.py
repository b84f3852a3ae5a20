"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Share, Site, Survey, of_task, shown
from coremerge.methods.ties import (
    Densities,
    Errors,
    Rates,
    Reduce,
    Trim,
    check_trim,
    elect,
    entries,
    errors_of,
    over_model,
    trimmed,
    trims,
)
from coremerge.registry import Values

SOURCE = "DARE, arXiv 2311.03099"


def _drops(values: Values) -> list[str]:
    rate = values["drop_rate"]
    return [f"drops entries of each adapter's core with probability {shown(rate)}"] if rate else []


@METHODS.register("dare", elementwise=True, source=SOURCE, cuts=_drops, neutral={"drop_rate": 0.0})
def dare(drop_rate: Rates = 0.5) -> Method:
    """Drop each entry with probability ``drop_rate``, divide the rest by 1 − ``drop_rate``, sum.

    The mask depends on the recipe's seed, the module's and the adapter's name only.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        return drop(cores, site, drop_rate).sum(0)

    return merge


def _survey(values: Values) -> Survey | None:
    return over_model(values, lambda cores, site: _dropped(cores, site, values["drop_rate"]))


@METHODS.register(
    "dare_ties",
    elementwise=True,
    source=SOURCE,
    cuts=lambda v: [*_drops(v), *trims(v)],
    neutral={"drop_rate": 0.0, "density": 1.0},
    surveys=_survey,
)
def dare_ties(
    drop_rate: Rates = 0.5, density: Densities = 0.2, reduce: Reduce = "mean", trim: Trim = "module"
) -> Method:
    """DARE, then TIES.

    Args:
        trim: within each ``module`` or the whole ``model``, as in ``ties``; entries that were dropped count as zeros.
    """
    check_trim(density, trim)

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        x, errors = _dropped(cores, site, drop_rate)
        return elect(trimmed(x, errors, density, trim, site), reduce, errors)

    return merge


def _dropped(cores: Sequence[LowRank], site: Site, drop_rate: Share) -> tuple[Tensor, Errors]:
    left = [1 - of_task(drop_rate, t, site) for t in range(len(cores))]
    grown = [core * (1 / share) for core, share in zip(cores, left, strict=True)]  # of them, and of their errors
    return drop(cores, site, drop_rate), errors_of(grown)


def drop(cores: Sequence[LowRank], site: Site, drop_rate: Share) -> Tensor:
    """The cores' entries (T, ..., p, q), each kept with probability 1 − ``drop_rate`` and rescaled."""
    found = entries(cores)
    for t, one in enumerate(found):
        rate = of_task(drop_rate, t, site)
        one.div_(1 - rate).masked_fill_(site.uniform(t, one) < rate, 0.0)
    return found
