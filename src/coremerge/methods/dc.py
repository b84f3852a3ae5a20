"""DC-Merge: evened strengths, seen between directions that all adapters have in common, and the largest entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from coremerge.linalg import LEVEL, RTOL, eigh, top
from coremerge.lowrank import LowRank, ThinSVD, svds
from coremerge.methods import METHODS, Method, Site
from coremerge.methods.ties import VOTE, Density, elect
from coremerge.methods.tsv import covers
from coremerge.registry import Values

Smoothing = Literal["average", "linear", "own"]

TIED = 1e-6
"""Singular values that differ by less, next to the largest of all, are one: an SVD gives any basis of their vectors."""


def _cuts(values: Values) -> list[str]:
    share = values["density"]
    few = f"keeps the largest entries of each adapter between common directions, a share of {share:g}"
    return [f"{few} and at least as many as it has directions", "drops what is between the directions of two adapters"]


@METHODS.register(
    "dc",
    unitary=True,
    source="DC-Merge, arXiv 2603.06242, as its code for LoRA does it",
    cuts=_cuts,
    neutral={"smoothing": "own", "density": 1.0},
)
def dc(
    smoothing: Smoothing = "average",
    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 5.0,
    density: Density = 0.001,
) -> Method:
    """Even each task's strengths, see all tasks between common orthonormal directions, and merge as TIES there.

    X_t = U_t S_t V_tᵀ, S_t smoothed; U = polar([U_1 … U_T]), V = polar([V_1 … V_T]); of each M_t = Uᵀ X_t V the largest
    entries; M their mean, where they have one sign; of M the T blocks on its diagonal, each as large as a task's rank;
    U M Vᵀ. Of directions that are equally strong, which an SVD gives in any basis, those are taken that others are
    nearest to and farthest from.

    Choose it for adapters that share few directions, and whose weak ones matter as much as the strong ones. Not for
    near copies: entries of what is shared crowd out those of the rest.

    Args:
        smoothing: a task's strengths become their mean; or fall on a line, with the sum that they had; or stay as they
            are.
        rho: of the line, the most that its first is next to its last.
        density: the share of the entries of each M_t that is kept; at least as many as the task has directions. The
            published 0.001 is just that many of 8 adapters of rank 16.
    """

    def merge(cores: Sequence[LowRank], site: Site) -> LowRank:
        largest = top(torch.stack([top(svd.values) for svd in svds(cores)], -1))
        parts = [core.svd.significant(largest=largest) for core in cores]
        turned = _turned(parts, largest)
        (left, _), (right, _) = covers(turned)
        edges = list(pairwise(accumulate((part.values.shape[-1] for part in parts), initial=0)))
        seen, known = [], []
        for part in parts if smoothing == "own" else [_smoothed(own, rho, smoothing) for own in turned]:
            error = _error(part, largest, left.shape[-1])
            m = ((left.mT @ part.left) * part.values.unsqueeze(-2)) @ (part.right @ right)
            kept = _largest(m, max(part.values.shape[-1], int(density * m.shape[-2] * m.shape[-1])), error)
            seen.append([kept[..., a:b, a:b].clone() for a, b in edges])
            known.append((error, torch.full_like(error, RTOL)))
        merged = [elect(torch.stack(own), "mean", known) for own in zip(*seen, strict=True)]
        mixed = [left[..., a:b] @ block for (a, b), block in zip(edges, merged, strict=True)]
        return LowRank(torch.cat(mixed, -1), right.mT)

    return merge


def _turned(parts: Sequence[ThinSVD], largest: Tensor) -> list[ThinSVD]:
    """``parts`` with vectors of one strength turned to their principal directions next to those of all parts.

    An SVD gives any basis of them, and what comes after it would see which. They are eigenvectors of S + l·H, H how
    much each direction lies in the spans of all, between values that are nearer to each other than l, or than errors.
    """
    lefts, rights = torch.cat([part.left for part in parts], -1), torch.cat([part.right for part in parts], -2)
    return [_turned_to(part, lefts, rights, TIED * largest / len(parts)) for part in parts]


def _turned_to(part: ThinSVD, lefts: Tensor, rights: Tensor, level: Tensor) -> ThinSVD:
    values = part.values
    if values.shape[-1] < 2:
        return part
    if part.noise is not None:
        level = level.maximum(LEVEL * part.noise.amax(-1).to(level))
    level = level[..., None, None]
    own, other = part.left.mT @ lefts, part.right @ rights.mT
    near = (values.unsqueeze(-1) - values.unsqueeze(-2)).abs() <= level
    shared = torch.where(near, own @ own.mT + other @ other.mT, 0.0)
    turn = eigh(torch.diag_embed(values) + level * shared)[1].flip(-1)
    weights = turn.square()
    noise = None if part.noise is None else (part.noise.square().unsqueeze(-2).to(weights) @ weights).squeeze(-2).sqrt()
    found = (values.unsqueeze(-2) @ weights).squeeze(-2)
    return ThinSVD(part.left @ turn, found, turn.mT @ part.right, noise)


def _smoothed(part: ThinSVD, rho: float, smoothing: Smoothing) -> ThinSVD:
    """With values on a line of the same sum, the first at most so many times the last; the errors go along."""
    values = part.values
    if values.shape[-1] == 0:
        return part
    steepest = 1.0 if smoothing == "average" else rho
    ratio = (values[..., :1] / values[..., -1:]).clamp(1.0, steepest)
    line = ratio + (1 - ratio) * torch.linspace(0, 1, values.shape[-1]).to(values)
    new = line * (values.sum(-1, keepdim=True) / line.sum(-1, keepdim=True))
    return replace(part, values=new, noise=None if part.noise is None else part.noise * (new / values))


def _largest(m: Tensor, keep: int, error: Tensor) -> Tensor:
    """``m`` (..., R, R) with all but its ``keep`` largest entries zero, and those that are as large but for errors."""
    magnitude = m.abs()
    size = m.shape[-2] * m.shape[-1]
    least = VOTE * error
    if 0 < keep < size:
        last = magnitude.flatten(-2).kthvalue(size - keep + 1, dim=-1).values
        least = least.maximum(last - VOTE * error)
    return torch.where(magnitude > least[..., None, None], m, 0.0)


def _error(part: ThinSVD, largest: Tensor, width: int) -> Tensor:
    """Of an entry of M_t (...): what u_i and v_i are off by points anywhere in ``width`` directions."""
    least = RTOL * largest
    if part.noise is None or width == 0:
        return least
    return least.maximum(part.noise.square().sum(-1).sqrt().to(least) / width**0.5)
