"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from coremerge.errors import ConfigError
from coremerge.layered import SOME, Condition
from coremerge.linalg import column_norms
from coremerge.lowrank import LowRank
from coremerge.methods import METHODS, Method, Share, Site, Survey, of_task, shown
from coremerge.methods.largest import Tally, joined, tally
from coremerge.registry import Values

Density = Annotated[float, Field(gt=0, le=1)]
Densities = (
    Density
    | tuple[Density | Annotated[tuple[Density, ...], SOME] | Annotated[tuple[Condition[Density], ...], SOME], ...]
)
"""One for all adapters, or for each, in their order, one or what differs by layer."""

Rate = Annotated[float, Field(ge=0, lt=1)]
Rates = Rate | tuple[Rate | Annotated[tuple[Rate, ...], SOME] | Annotated[tuple[Condition[Rate], ...], SOME], ...]

Reduce = Literal["mean", "sum"]

Trim = Literal["module", "model"]
"""Of which entries those that are kept are the largest."""


def trims(values: Values) -> list[str]:
    """What is left out, in words."""
    return [f"{kept(values)}, and of them one sign"]


def kept(values: Values) -> str:
    """What trimming keeps, in words."""
    of = "each adapter, over all its modules" if values["trim"] == "model" else "each adapter's core"
    return f"keeps the largest entries of {of}, a share of {shown(values['density'])}"


def check_trim(density: Share, trim: Trim) -> None:
    """Refuse a density by layer of what is trimmed over all of them.

    Raises:
        ConfigError: it is one.
    """
    if trim == "model" and isinstance(density, tuple) and any(isinstance(own, tuple) for own in density):
        raise ConfigError(
            "over the whole model there is one density, and this one differs by layer", key="density", value=density,
            remedy="Give a number, or trim=module",
        )  # fmt: skip


def over_model(values: Values, look: Callable[[Sequence[LowRank], Site], tuple[Tensor, Errors]]) -> Survey | None:
    """The pass over all modules that finds the least entry of each adapter that is kept; None: it is not asked for.

    ``look``: the entries that are to be trimmed, and their errors. An adapter's entries are those of the modules in
    which it has any that is more than an error.
    """
    if values["trim"] != "model":
        return None

    def take_down(cores: Sequence[LowRank], site: Site) -> list[Tally]:
        x = trim_each(*look(cores, site))
        return [tally(one[(one != 0).flatten(-2).any(-1)]) for one in x]

    def join(found: Sequence[list[Tally]]) -> list[Tally]:
        return [joined(own) for own in zip(*found, strict=True)]

    def settle(found: list[Tally]) -> tuple[float, ...]:
        return tuple(_least_of(one, of_task(values["density"], t, Site())) for t, one in enumerate(found))

    return Survey(take_down, join, settle)


def _least_of(counted: Tally, density: float) -> float:
    return counted.largest(max(1, round(density * counted.total))) if counted.total else 0.0


def _as_given(cores: Sequence[LowRank], site: Site) -> tuple[Tensor, Errors]:
    return entries(cores), errors_of(cores)


def survey_of(values: Values) -> Survey | None:
    """Of a method that trims the cores as they are given."""
    return over_model(values, _as_given)


@METHODS.register(
    "ties",
    elementwise=True,
    source="TIES-Merging, arXiv 2306.01708",
    cuts=trims,
    neutral={"density": 1.0},
    surveys=survey_of,
)
def ties(density: Densities = 0.2, reduce: Reduce = "mean", trim: Trim = "module") -> Method:
    """Keep each task's largest entries, elect the sign of their sum, average the entries that agree with it.

    Args:
        density: the share of entries of each core that is kept, in (0, 1]; or a list, one for each adapter.
        reduce: ``mean`` over the agreeing non-zero entries, or their ``sum``.
        trim: ``module``: the largest entries of each module; ``model``: of all modules together, as in the paper and in
            KnOTS's code, so that a module with large entries keeps more of them. That takes a pass over all modules
            before the merge.

    Raises:
        ConfigError: a density that differs by layer, of what is trimmed over the whole model.
    """
    check_trim(density, trim)

    def merge(cores: Sequence[LowRank], site: Site) -> Tensor:
        errors = errors_of(cores)
        return elect(trimmed(entries(cores), errors, density, trim, site), reduce, errors)

    return merge


ROUNDING = 1e-14
"""An entry below this share of the largest of its matrix is rounding error, which has no sign to vote with."""


VOTE = 3.0
"""Nor has one that is no larger than so many times the mean error of an entry: the largest is √6 = 2.45 times that."""


Errors = Sequence[tuple[Tensor, Tensor] | None]
"""Of the entries of each core: see :func:`errors_of`."""


def trimmed(x: Tensor, errors: Errors, density: Share, within: Trim, site: Site) -> Tensor:
    """``x`` (T, ..., p, q), which is written over, each core's entries trimmed within the module or the whole model.

    Raises:
        ValueError: for the whole model, without what :func:`over_model` found.
    """
    if within == "module":
        return trim_each(x, errors, density, site)
    if site.known is None:
        raise ValueError("what is kept of the whole model is known after a pass over all modules")
    for t, (one, least) in enumerate(zip(trim_each(x, errors), site.known, strict=True)):
        if of_task(density, t, site) < 1:
            one.masked_fill_(one.abs() < least, 0.0)
    return x


def errors_of(cores: Sequence[LowRank]) -> Errors:
    """Of each core the mean error (...) of an entry, from those of the stored numbers, and next to the entry.

    None: it is exact. Large entries are sums of large products, whose errors are larger than the mean: relative ones of
    columns count by the size of these, as one that is next to nothing may be known badly.
    """
    return [_errors(core) for core in cores]


def _errors(core: LowRank) -> tuple[Tensor, Tensor] | None:
    if core.error is None or core.rounding is None or not core.rank:
        return None if core.rank else (core.left.new_zeros(core.left.shape[:-2]),) * 2
    sizes = column_norms(core.left.double()) * column_norms(core.right.mT.double())
    return core.error / max(1, math.prod(core.shape)) ** 0.5, (core.error / sizes.square().sum(-1).sqrt()).nan_to_num(0)


def entries(cores: Sequence[LowRank]) -> Tensor:
    """The cores' entries (T, ..., p, q), each written in its place: in full space another copy of them is gigabytes."""
    left, right = cores[0].left, cores[0].right
    found = left.new_empty(len(cores), *left.shape[:-1], right.shape[-1])
    for core, place in zip(cores, found, strict=True):
        torch.matmul(core.left, core.right, out=place)
    return found


def trim_each(x: Tensor, errors: Errors, density: Share = 1.0, site: Site | None = None) -> Tensor:
    """``x`` (T, ..., p, q), which is written over, each core's entries trimmed; with a density of 1 of errors alone."""
    for t, (one, error) in enumerate(zip(x, errors, strict=True)):  # one after the other: each needs several copies
        one.copy_(trim(one, of_task(density, t, site or Site()), None if error is None else VOTE * error[0]))
    return x


def trim(x: Tensor, density: float, least: Tensor | None = None) -> Tensor:
    """``x`` (..., p, q) with all but the ⌈density · p · q⌋ entries of largest magnitude set to zero, in each matrix.

    Rounding errors are zero, too: those below ``least`` (...).
    """
    size = x.shape[-2] * x.shape[-1]
    if not size:
        return x
    keep = max(1, round(density * size))
    magnitude = x.abs()
    threshold = magnitude.amax((-2, -1)) * ROUNDING
    threshold = threshold if least is None else threshold.maximum(least)
    if keep < size:
        threshold = threshold.maximum(magnitude.flatten(-2).kthvalue(size - keep + 1, dim=-1).values)
    return x.masked_fill(magnitude < threshold[..., None, None], 0.0)


def elect(x: Tensor, reduce: Reduce, errors: Errors = ()) -> Tensor:
    """``x`` (T, ..., p, q) → (..., p, q): the entries whose sign is that of the sum over T, averaged or summed.

    A sum that is no larger than the ``errors`` of its terms is zero, where all of them are known.
    """
    elected = sum_beyond(x, errors).sign_()
    merged, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for one in x:
        agree = (one.sign() == elected).logical_and_(one != 0)
        merged += torch.where(agree, one, 0.0)
        count += agree
    return merged.div_(count.clamp_(min=1)) if reduce == "mean" else merged


def sum_beyond(x: Tensor, errors: Errors) -> Tensor:
    """The sum over T of ``x`` (T, ..., p, q), zero where it is no larger than the ``errors`` of its terms."""
    whole, variance = x.sum(0), variance_of(x, errors)
    return whole if variance is None else whole.masked_fill_(whole.abs() <= VOTE * variance.sqrt_(), 0.0)


def variance_of(x: Tensor, errors: Errors) -> Tensor | None:
    """Of the errors of the sum over T of ``x`` (T, ..., p, q), entry by entry; None: some are not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(x):
        return None
    variance = torch.zeros_like(x[0])
    for one, (even, relative) in zip(x, known, strict=True):
        variance += (relative[..., None, None] * one).square_().add_(even[..., None, None] ** 2)
    return variance
