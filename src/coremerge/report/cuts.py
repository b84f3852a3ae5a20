"""What a recipe leaves out of its adapters, or of their merge, in plain words: nothing is cut in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coremerge.methods import METHODS
from coremerge.registry import Operator, parse_spec
from coremerge.spaces import SPACES
from coremerge.steps import STEPS

if TYPE_CHECKING:
    from coremerge.outcome import Report
    from coremerge.plan import Plan

ALL = 1 - 1e-6
"""More than this share of the energy is all of it."""

LISTED = 8
"""With more adapters than this, only the least and the largest share are said."""


def cuts_of(
    method: str,
    parameters: Mapping[str, Any],
    steps: Sequence[Any] = (),
    kept: Mapping[str, float] | None = None,
    *,
    space: Any = "core",
) -> Iterator[str]:
    """A sentence for each thing that the space, the method and the steps cut.

    Args:
        method: a recipe's.
        parameters: the method's; those that are not named are at their defaults.
        steps: a recipe's.
        kept: adapter → share of its energy that is kept, where it is known; where it is all, nothing is said.
        space: a recipe's.

    Example:
        >>> list(cuts_of("tsv", {"rank": 4}, kept={"a": 0.54, "b": 1.0}))
        ['tsv (rank=4) keeps at most 4 directions of each adapter: of its energy 54 % (a), 100 % (b)']
    """
    operator: Operator[Any]
    if not kept or min(kept.values()) < ALL:
        if parse_spec(space)[0] in SPACES:
            operator = SPACES.resolve(space)
            for what in operator.cuts:
                yield f"the space {operator.entry.name} {what}{_shares(kept)}"
                kept = None
        if method in METHODS:
            operator = METHODS.resolve({method: parameters})
            yield from (f"{operator} {what}{_shares(kept)}" for what in operator.cuts)
    for step in steps:
        if parse_spec(step)[0] in STEPS:
            operator = STEPS.resolve(step)
            yield from (f"the step {operator.entry.name} {what}" for what in operator.cuts)


def taken_as_it_is(plan: Plan, report: Report) -> Iterator[str]:
    """Where a recipe that cuts or flattens by default had one update to merge."""
    if report.alone and plan.resolved.idle:
        idle = " and ".join(map(str, plan.resolved.idle))
        yield (
            f"in {report.alone} of {len(report.modules)} modules there is one update to merge: it is taken as it is"
            f" ({idle} would act there only if you named it)"
        )


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
