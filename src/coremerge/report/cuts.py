"""What a recipe leaves out of its adapters, or of their merge, in plain words: nothing is cut in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coremerge.methods import METHODS
from coremerge.registry import parse_spec

ALL = 1 - 1e-6
"""More than this share of the energy is all of it."""

LISTED = 8
"""With more adapters than this, only the least and the largest share are said."""


def cuts_of(
    method: str, parameters: Mapping[str, Any], steps: Sequence[Any] = (), kept: Mapping[str, float] | None = None
) -> Iterator[str]:
    """A sentence for each thing that the method and the steps cut.

    Args:
        method: a recipe's.
        parameters: the method's; those that are not named are at their defaults.
        steps: a recipe's.
        kept: adapter → share of its energy that the method keeps, where it is known; where it is all, nothing is said.

    Example:
        >>> list(cuts_of("tsv", {"rank": 4}, kept={"a": 0.54, "b": 1.0}))
        ['tsv (rank=4) keeps at most 4 directions of each adapter: of its energy 54 % (a), 100 % (b)']
    """
    known = METHODS[method].parameters if method in METHODS else {}
    shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
    named = f"{method} ({shown})" if shown else method
    if not kept or min(kept.values()) < ALL:
        yield from (f"{named} {what}{_shares(kept)}" for what in _of_method(method, {**known, **parameters}))
    for step in steps:
        name, options = parse_spec(step)
        if name == "truncate":
            yield f"the step truncate keeps at most {_directions(options.get('rank'))} of the merged update"


def cut_to_rank(rank: int | None, lost: float | None, warnings: Sequence[str]) -> Iterator[str]:
    """What the cut of the result lost of its energy, unless a warning says it."""
    if lost and not _said(warnings):
        yield f"the cut to rank {rank} loses {percent(lost)} of the merged update's energy"


def cut_of_fit(lost: float | None, warnings: Sequence[str]) -> Iterator[str]:
    """What the cut of a fit lost of what it puts out, unless a warning says it."""
    if lost and not _said(warnings):
        yield f"the cut to rank loses {percent(lost)} of the merged outputs on the inputs, on average over modules"


def _said(warnings: Sequence[str]) -> bool:
    return any(warning.startswith("the cut to rank") for warning in warnings)


def _of_method(method: str, given: Mapping[str, Any]) -> Iterator[str]:
    rank, density, rate = (given.get(key) for key in ("rank", "density", "drop_rate"))
    if method == "tsv" and rank not in (None, "none", "null"):
        yield f"keeps at most {_directions(rank)} of each adapter"
    if method == "cart":
        yield f"keeps at most {_directions(rank)} of each adapter's deviation from their mean"
    if method in ("dare", "dare_ties") and rate:
        yield f"drops entries of each adapter's core with probability {rate}"
    if method in ("ties", "dare_ties"):
        yield f"keeps the largest entries of each adapter's core, a share of {density}, and of them one sign"


def _directions(rank: object) -> str:
    return f"{rank} direction{'s' if str(rank) != '1' else ''}"


def _shares(kept: Mapping[str, float] | None) -> str:
    if not kept:
        return ""
    if len(kept) <= LISTED:
        return ": of its energy " + ", ".join(f"{percent(share)} ({name})" for name, share in kept.items())
    least, most = (choose(kept, key=kept.__getitem__) for choose in (min, max))
    return f": of its energy {percent(kept[least])} ({least}) to {percent(kept[most])} ({most})"


def percent(share: float) -> str:
    """A share that is called all, or none, only where it is.

    Example:
        >>> percent(0.5367), percent(0.9999), percent(1.0), percent(0.00001)
        ('54 %', '99.9 %', '100 %', '<0.1 %')
    """
    if share >= ALL:
        return "100 %"
    if share >= 0.995:
        return f"{math.floor(1000 * share) / 10:.1f} %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %" if share >= 0.001 else "<0.1 %"
