"""DELLA: drop entries at random, small ones more often, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Site, of_task, shown
from coremerge.methods.ties import Densities, Rates, Reduce, entries, errors_of, trim_each
from coremerge.methods.ties import elect as elect_signs
from coremerge.registry import Values


def _drops(values: Values) -> list[str]:
    middle, off = shown(values["density"]), shown(values["epsilon"])
    return [
        f"keeps entries of each adapter's core with probability {middle}, less {off} (the smallest of a row) to plus"
        f" {off} (its largest)"
    ]


@METHODS.register(
    "della",
    elementwise=True,
    source="DELLA-Merging, arXiv 2406.11617",
    cuts=_drops,
    neutral={"density": 1.0, "epsilon": 0.0},
)
def della(
    density: Densities = 0.5,
    epsilon: Rates = 0.1,
    elect: bool = True,
    reduce: Reduce = "mean",
) -> Method:
    """Keep entries with a probability that grows with their rank in the row, divide by it, elect signs and average.

    The probability is ``density`` − ``epsilon`` for a row's smallest entry and ``density`` + ``epsilon`` for its
    largest, evenly in between. The draw depends on the recipe's seed, the module's and the adapter's name only.

    Args:
        density: the share of entries that is kept on average, in (0, 1]; or a list, one for each adapter.
        epsilon: half the range of probabilities; or a list.
        elect: merge as TIES does; false: sum (mergekit's ``della_linear``).
        reduce: with ``elect``, ``mean`` over the agreeing entries, or their ``sum``.

    Raises:
        ConfigError: probabilities that are none.
    """
    if not isinstance(density, tuple) and not isinstance(epsilon, tuple):
        _check(density, epsilon)

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        x = trim_each(entries(cores), errors_of(cores))  # what rounding made has no sign to vote with
        chances = [(of_task(density, t, site), of_task(epsilon, t, site)) for t in range(len(cores))]
        for t, (one, chance) in enumerate(zip(x, chances, strict=True)):
            _check(*chance)
            kept = probabilities(one, *chance)
            one.div_(kept).masked_fill_(site.uniform(t, one) >= kept, 0.0)
        if not elect:
            return x.sum(0)
        least = [middle - off for middle, off in chances]
        grown = [core * (1 / share) for core, share in zip(cores, least, strict=True)]  # an entry's errors, at most
        return elect_signs(x, reduce, errors_of(grown))

    return merge


def _check(density: float, epsilon: float) -> None:
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise ConfigError(
            "density ± epsilon are probabilities", key="epsilon", value=epsilon,
            remedy=f"With density {density:g}, less than {density:g} and at most {1 - density:g}",
        )  # fmt: skip


def probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    """Of each entry of ``x`` (..., p, q) to be kept, by its place among its row's magnitudes."""
    if x.shape[-1] == 1:
        return torch.full_like(x, density)
    places = x.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(x.dtype)
    return density - epsilon + 2 * epsilon * places / max(1, x.shape[-1] - 1)
