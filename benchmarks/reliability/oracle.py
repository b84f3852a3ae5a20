"""What a merge must give, computed apart: dense, in float64, from numbers brought to ordinary size beforehand.

Every method here is homogeneous: a power of two can be taken out of all left factors, all right factors and all
weights, exactly, and kept as a whole number. Nothing overflows on the way, whatever the size of the files' numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coremerge.methods import Site

RTOL = 1e-8
"""What counts as zero: in the ranks of TSV's tasks, of polar factors and of what isotropize flattens, and among the
updates whose mean norm ``scale: auto`` takes."""

NOISE = 1e-13
"""The rank of a basis: nothing but rounding error is cut."""


@dataclass(frozen=True)
class Scaled:
    """The matrix ``value`` · 2^``exponent``."""

    value: Tensor
    exponent: int = 0

    @classmethod
    def of(cls, value: Tensor) -> Scaled:
        """``value`` in float64, its largest entry brought between ½ and 1."""
        value = value.double()
        exponent = math.frexp(float(value.abs().max()) if value.numel() else 0.0)[1]
        return cls(shifted(value, -exponent), exponent)

    def times(self, factor: float) -> Scaled:
        """Scaled by a number of any size."""
        mantissa, exponent = math.frexp(factor)
        return Scaled(self.value * mantissa, self.exponent + exponent)

    def moved(self, octaves: int) -> Scaled:
        """Times 2^``octaves``."""
        return Scaled(self.value, self.exponent + octaves)

    def at(self, exponent: int) -> Tensor:
        """The matrix over 2^``exponent``."""
        return shifted(self.value, self.exponent - exponent)


def shifted(value: Tensor, exponent: int) -> Tensor:
    """``value`` · 2^``exponent``, in steps that are themselves float64."""
    while exponent:
        step = max(-1000, min(1000, exponent))
        value, exponent = value * 2.0**step, exponent - step
    return value


@dataclass(frozen=True)
class Task:
    """One adapter's module as it is stored.

    Attributes:
        left: B (m, r).
        right: A (r, n).
        scale: lora_alpha / r.
        weight: in the merge.
    """

    left: Tensor
    right: Tensor
    scale: float
    weight: float = 1.0

    def scaled(self, scale: float) -> Task:
        """The same at another scale."""
        return replace(self, scale=scale)

    def times(self, factor: float) -> Task:
        """The same, so many times as strong."""
        return self.scaled(self.scale * factor)


@dataclass(frozen=True)
class How:
    """A recipe, spelt out."""

    space: str = "core"
    method: str = "sum"
    options: Mapping[str, float] = field(default_factory=dict)
    step: str = "none"
    scale: float | str = 1.0


@dataclass(frozen=True)
class Wanted:
    """Of one module.

    Attributes:
        merged: what must be written.
        inputs: norm (1, 1) of the largest weighted input, scaled as the result is.
        ratios: of spectral and of Frobenius norms, merged over inputs' mean; NaN without any input.
    """

    merged: Scaled
    inputs: Scaled
    ratios: tuple[float, float] = (1.0, 1.0)

    def times(self, factor: float, exponent: int = 0) -> Wanted:
        """Scaled by ``factor`` · 2^``exponent``."""
        return Wanted(*(x.times(factor).moved(exponent) for x in (self.merged, self.inputs)))


def wanted(modules: Mapping[str, Sequence[Task]], how: How, names: Sequence[str]) -> dict[str, Wanted]:
    """Module → what a merge of its ``modules``' tasks, one per adapter of these ``names``, must write."""
    heavy = max(math.frexp(task.weight)[1] for tasks in modules.values() for task in tasks)
    found = {module: _wanted(module, tasks, how, names, heavy) for module, tasks in modules.items()}
    if how.scale != "auto":
        return {module: one.times(float(how.scale), heavy) for module, one in found.items()}
    counted = [one.ratios for one in found.values() if math.isfinite(one.ratios[0])]
    product = math.prod(sum(ratios) / len(counted) for ratios in zip(*counted, strict=True))
    # the ratios are those of weights over 2^heavy: the factor takes care of the rest
    cancelled = product < 1e-20
    return {module: one.times(*((1.0, heavy) if cancelled else (product**-0.5, 0))) for module, one in found.items()}


def _wanted(module: str, tasks: Sequence[Task], how: How, names: Sequence[str], heavy: int) -> Wanted:
    lefts = [Scaled.of(task.left).times(task.scale) for task in tasks]
    rights = [Scaled.of(task.right) for task in tasks]
    up, along = (max((x.exponent for x in side if x.value.any()), default=0) for side in (lefts, rights))
    pairs = [(left.at(up), right.at(along)) for left, right in zip(lefts, rights, strict=True)]
    weights = [float(Scaled.of(torch.tensor(task.weight, dtype=torch.float64)).at(heavy)) for task in tasks]
    inputs = [a @ b for a, b in pairs]
    merged = _merged(pairs, weights, how, Site(0, (module,), tuple(names)))
    largest = max(abs(w) * float(x.norm()) for w, x in zip(weights, inputs, strict=True))
    counted = [x for task, x in zip(tasks, inputs, strict=True) if task.weight]
    spectral, frobenius = (_ratio(merged, counted, order) for order in (2, "fro"))
    size = Scaled(torch.full((1, 1), largest).double(), up + along)
    return Wanted(Scaled(merged, up + along), size, (spectral, frobenius))


def _ratio(merged: Tensor, inputs: Sequence[Tensor], order: int | str) -> float:
    sizes = [_norm(x, 2) for x in inputs]
    norms = [_norm(x, order) for x, size in zip(inputs, sizes, strict=True) if size > RTOL * max(sizes, default=0.0)]
    return _norm(merged, order) / (sum(norms) / len(norms)) if norms else math.nan


def _norm(x: Tensor, order: int | str) -> float:
    return float(torch.linalg.matrix_norm(x, order))  # type: ignore[arg-type]


def _merged(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], how: How, site: Site) -> Tensor:
    if how.step == "balance":
        pairs = [_balanced(a @ b) for a, b in pairs]
    rows, columns = _bases(pairs, how)
    cores = [w * (rows.T @ a) @ (b @ columns) for w, (a, b) in zip(weights, pairs, strict=True)]
    merged = METHODS[how.method](cores, site, **how.options)
    if how.step == "isotropize":
        u, s, vh = thin(merged, RTOL)
        merged = s.mean() * u @ vh if len(s) else merged
    if how.step == "truncate":
        u, s, vh = thin(merged)
        merged = (u[:, :2] * s[:2]) @ vh[:2]
    return rows @ merged @ columns.T


def _bases(pairs: Sequence[tuple[Tensor, Tensor]], how: How) -> tuple[Tensor, Tensor]:
    m, n = len(pairs[0][0]), pairs[0][1].shape[1]
    columns = torch.eye(n).double()
    if how.space == "full" or how.method not in ELEMENTWISE:
        return torch.eye(m).double(), columns
    if how.space == "knots":
        return thin(torch.cat([a @ b for a, b in pairs], 1))[0], columns
    return thin(torch.cat([a for a, _ in pairs], 1))[0], thin(torch.cat([b for _, b in pairs], 0))[2].T


def thin(x: Tensor, cut: float = NOISE) -> tuple[Tensor, Tensor, Tensor]:
    """SVD without what is below ``cut`` times the largest singular value."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > cut * s[0]).sum()) if len(s) else 0
    return u[:, :k], s[:k], vh[:k]


def _balanced(x: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = thin(x)
    return u * s.sqrt(), s.sqrt()[:, None] * vh


def _mean(xs: Sequence[Tensor], site: Site) -> Tensor:
    return torch.stack(list(xs)).mean(0)


def _sum(xs: Sequence[Tensor], site: Site) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def _ties(xs: Sequence[Tensor], site: Site, density: float = 0.2) -> Tensor:
    kept = torch.stack([_trimmed(x, density) for x in xs])
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return torch.where(agree, kept, 0.0).sum(0) / agree.sum(0).clamp(min=1)


def _trimmed(x: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * x.numel()))
    least = float(x.abs().flatten().sort(descending=True).values[keep - 1]) if x.numel() else 0.0
    floor = 1e-14 * float(x.abs().max()) if x.numel() else 0.0
    return torch.where(x.abs() >= max(least, floor), x, 0.0)


def _dare(xs: Sequence[Tensor], site: Site, drop_rate: float = 0.5) -> Tensor:
    masks = [site.uniform(t, x) >= drop_rate for t, x in enumerate(xs)]
    return torch.stack([x * mask / (1 - drop_rate) for x, mask in zip(xs, masks, strict=True)]).sum(0)


def _tsv(xs: Sequence[Tensor], site: Site, rank: int | None = None) -> Tensor:
    largest = max(_norm(x, 2) for x in xs)
    lefts, values, rights = [], [], []
    for u, s, vh in (torch.linalg.svd(x, full_matrices=False) for x in xs):
        kept = int((s > RTOL * largest).sum()) if rank is None else min(int((s > RTOL * largest).sum()), rank)
        lefts.append(u[:, :kept]), values.append(s[:kept]), rights.append(vh[:kept].T)
    return _polar(torch.cat(lefts, 1)) @ torch.diag(torch.cat(values)) @ _polar(torch.cat(rights, 1)).T


def _polar(x: Tensor) -> Tensor:
    u, _, vh = thin(x, RTOL)
    return u @ vh


def _cart(xs: Sequence[Tensor], site: Site, rank: int = 8) -> Tensor:
    mean = _mean(xs, site)
    parts = [torch.linalg.svd(x - mean, full_matrices=False) for x in xs]
    return mean + sum((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in parts)


ELEMENTWISE = ("ties", "dare")
"""Methods that see the coordinates; to all others every space is the full one."""

METHODS = {"sum": _sum, "mean": _mean, "ties": _ties, "dare": _dare, "tsv": _tsv, "cart": _cart}
