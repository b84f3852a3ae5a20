"""Updates that are one and the same but for a factor and rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coremerge.linalg import NOISE, RaggedRankError
from coremerge.lowrank import LowRank, inner_products, total
from coremerge.spaces import Coordinates

LIKELY = 0.98
"""Cosine from which on two updates are compared in full: even 8-bit floats leave more of a copy."""

NEAR = 3.0
"""Copies are no farther apart than so many times the mean error: the largest is √6 = 2.45 times the mean."""

CORNER = 8
"""Rows and columns that are looked at before a whole factor is: hardly any is zero there alone."""


def holders(updates: Sequence[LowRank], weights: Sequence[Sequence[float]]) -> int:
    """How many of ``updates`` (each (..., m, n)) are not zero, and have ``weights`` (module by module) that are not.

    Raises:
        RaggedRankError: the batch elements disagree.
    """
    there = [_nonzero(update) & _counted(own) for update, own in zip(updates, weights, strict=True)]
    return _agreed(torch.stack(there).sum(0))


def _counted(weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights) != 0


def _nonzero(update: LowRank) -> Tensor:
    return (_any(update.left) & _any(update.right)).cpu().reshape(-1)


def _any(x: Tensor) -> Tensor:
    """Whether (...) a factor is not zero: a corner of it is looked at before all is."""
    corner = x[..., :CORNER, :CORNER].flatten(-2).any(-1)
    return corner if bool(corner.all()) else x.flatten(-2).any(-1)


def _agreed(counts: Tensor) -> int:
    if int(counts.max()) != int(counts.min()):
        raise RaggedRankError
    return int(counts.max())


def join_copies(coordinates: Coordinates, weights: Sequence[Sequence[float]]) -> tuple[Coordinates, int]:
    """The same with copies made exact, and how many different updates count, as :func:`holders` says.

    Cores that are multiples of each other, up to the errors of the numbers that were stored, become exact multiples of
    their mean: a method cannot make anything of the errors then. Where nothing is said of errors, all count as
    different.

    Raises:
        RaggedRankError: the batch elements disagree.
    """
    cores = coordinates.cores
    stack = total(cores)
    if stack.rounding is None:
        return coordinates, len(cores)
    inner = inner_products(stack, [core.rank for core in cores])
    likely, groups = _likely(inner), list[list[int]]()
    for i in _there(inner, weights):
        near = (g for g in groups if likely[g[0]][i])
        group = next((g for g in near if _copies(cores, inner, g[0], i, coordinates.share)), None)
        group.append(i) if group else groups.append([i])
    joined = dict(enumerate(cores))
    for group in (group for group in groups if len(group) > 1):
        joined |= _multiples(cores, inner, group, [_trust(cores[i]) for i in group])
    return replace(coordinates, cores=tuple(joined.values())), len(groups)


def as_one(coordinates: Coordinates, updates: Sequence[LowRank], weights: Sequence[Sequence[float]]) -> Coordinates:
    """``coordinates`` of ``updates`` taken as exact, all of which are copies: as exact multiples of their mean.

    Nothing acts on copies alone that would lift errors: their smallest directions need not be left out.
    """
    cores = coordinates.cores
    inner = inner_products(total(cores), [core.rank for core in cores])
    group = _there(inner, weights)
    joined = dict(enumerate(cores)) | _multiples(cores, inner, group, [_trust(updates[i]) for i in group])
    return replace(coordinates, cores=tuple(joined.values()))


def _there(inner: Tensor, weights: Sequence[Sequence[float]]) -> list[int]:
    """The numbers of the updates that are not zero, and count."""
    own = inner.diagonal(dim1=-2, dim2=-1)
    return [i for i, w in enumerate(weights) if _all_or_none((own[..., i] > 0).cpu().reshape(-1) & _counted(w))]


def _trust(update: LowRank) -> Tensor:
    """What its numbers weigh (...) in a mean of copies: those that were rounded less are nearer to the adapter."""
    assert update.rounding is not None
    return update.rounding.square().mean(-1).reciprocal()


def _all_or_none(flags: Tensor) -> bool:
    return bool(_agreed(flags.int().reshape(-1)))


def _likely(inner: Tensor) -> list[list[bool]]:
    """Which two of T updates have a cosine worth a closer look, in any element of the batch."""
    sizes = inner.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    near = inner > LIKELY * sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
    found: list[list[bool]] = near.reshape(-1, *near.shape[-2:]).any(0).tolist()
    return found


def _copies(cores: Sequence[LowRank], inner: Tensor, i: int, j: int, share: float) -> bool:
    one, other = cores[i] * _column(inner[..., i, j] / inner[..., i, i]), cores[j]
    difference = other - one
    assert difference.error is not None
    distance = difference.svd.values.square().sum(-1).sqrt()
    near = distance <= NEAR * difference.error / share + NOISE * inner[..., j, j].sqrt()
    return _all_or_none(near)


def _multiples(
    cores: Sequence[LowRank], inner: Tensor, group: Sequence[int], trust: Sequence[Tensor]
) -> dict[int, LowRank]:
    """Each of a group as a multiple of the mean of the directions of all, which has no more of them than one has."""
    first = group[0]
    sizes = [inner[..., first, i] / inner[..., first, first] for i in group]
    shares = [one / torch.stack(list(trust)).sum(0) for one in trust]
    mean = total([cores[i] * _column(share / size) for i, share, size in zip(group, shares, sizes, strict=True)])
    common = mean.svd.significant().truncate(max(cores[i].rank for i in group)).lowrank()
    return {i: common * _column(size) for i, size in zip(group, sizes, strict=True)}


def _column(factors: Tensor) -> Tensor:
    return factors[..., None, None]
