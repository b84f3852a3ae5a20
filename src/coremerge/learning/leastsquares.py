"""One module's merged core from sums over tokens: what is asked of it is linear, so nothing has to be descended.

For task k's inputs, z = Vᵀ x̂ is the module's input in the merged model, V being all q directions that the result reads
(the adapters' own, and some beyond: :mod:`coremerge.learning.beyond`), and y = Uᵀ[(W + Δ_k) x − W x̂] what the merged
core should make of it, so that the module's output is that of the model with adapter k alone, where the input is x.

Errors do not count alike in all directions: those in which adapter k itself moves the output count fully, the others by
the share :data:`ASIDE`. On inputs that tasks share, plain least squares would give each task a part of its demand, the
others' demands being in its way; here it need not, as what others write elsewhere hardly disturbs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coremerge import linalg

LEAST = 0.2
"""A task's demand counts as at least this share of what the module gives anyway, where weights are one over it.

What is small beside that is no great harm, however much of a small demand it is: without this, tasks whose adapters do
not have a module would hold it where it is. docs/log.md has what other shares do.
"""

LEAST_OF_MEAN = 1e-2
"""And as at least this share of the tasks' mean: where all tokens are alike, what a module gives does not vary."""

ASIDE = 0.1
"""How much an error counts in a direction in which the task's adapter does not move the output."""

SOFT = 1e-2
"""Share of the largest second moment of an adapter's outputs at which a direction counts half."""

METRIC = 1e-2
"""Share of the ridge that is added to the inputs' second moments where a rank is cut in their metric."""

STEPS, EXACT = 200, 1e-10
"""Of the conjugate gradients: at most so many, until the residual is this share of what it was."""


@dataclass
class Sums:
    """Of one task at one module, over the tokens of some inputs.

    Attributes:
        count: number of tokens.
        zz: (q, q) Σ z zᵀ.
        yz: (p, q) Σ y zᵀ.
        yy: (p, p) Σ y yᵀ.
        o: (p) Σ o, o = Uᵀ W x̂ being what the module gives without an update.
        oo: (p, p) Σ o oᵀ.
    """

    count: int
    zz: Tensor
    yz: Tensor
    yy: Tensor
    o: Tensor
    oo: Tensor

    @classmethod
    def zero(cls, p: int, q: int) -> Sums:
        """Of no tokens."""
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in ((q, q), (p, q), (p, p), (p,), (p, p))))

    @classmethod
    def of(cls, z: Tensor, y: Tensor, o: Tensor) -> Sums:
        """Of tokens: inputs ``z`` (tokens, q), demands ``y`` (tokens, p) and plain outputs ``o`` (tokens, p)."""
        z, y, o = z.double().cpu(), y.double().cpu(), o.double().cpu()
        return cls(len(z), z.mT @ z, y.mT @ z, y.mT @ y, o.sum(0), o.mT @ o)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, *(x + y for x, y in zip(self._sums(), other._sums(), strict=True)))

    def __iadd__(self, other: Sums) -> Sums:
        self.count += other.count
        for mine, more in zip(self._sums(), other._sums(), strict=True):
            mine.add_(more)
        return self

    def _sums(self) -> tuple[Tensor, ...]:
        return self.zz, self.yz, self.yy, self.o, self.oo

    def means(self, metric: Metric) -> Demand:
        """Per token."""
        middle = self.o / self.count
        given = self.oo / self.count - torch.outer(middle, middle)
        return Demand(metric, self.zz / self.count, self.yz / self.count, self.yy / self.count, given)


def shared(parts: Sequence[Mapping[str, Sums]]) -> dict[str, Sums]:
    """The sums of all parts."""
    whole = dict(parts[0])
    for part in parts[1:]:
        whole = {task: whole[task] + part[task] for task in whole}
    return whole


@dataclass(frozen=True)
class Metric:
    """How errors count: the matrix H = ``floor`` I + ``above`` ``above``ᵀ (p, p).

    Attributes:
        floor: in every direction.
        above: (p, r) more than that, orthogonal columns; r is the adapter's rank at most.
    """

    floor: float
    above: Tensor

    @classmethod
    def plain(cls, p: int) -> Metric:
        """All errors count alike."""
        return cls(1.0, torch.zeros(p, 0, dtype=torch.float64))

    def __matmul__(self, x: Tensor) -> Tensor:
        """H ``x`` (p, n)."""
        return self.floor * x + self.above @ (self.above.mT @ x)

    def between(self, x: Tensor, y: Tensor) -> float:
        """The trace of ``x``ᵀ H ``y``, both (p, n)."""
        return self.floor * float((x * y).sum()) + float(((self.above.mT @ x) * (self.above.mT @ y)).sum())

    def of(self, moments: Tensor) -> float:
        """The trace of H times the ``moments`` (p, p) of errors: their mean size."""
        return self.floor * float(moments.diagonal().sum()) + float(((self.above.mT @ moments) * self.above.mT).sum())

    def largest(self, moments: Tensor) -> float:
        """The largest eigenvalue of H^½ ``moments`` H^½: their size in the one direction in which it is largest."""
        root = self.root()
        values = linalg.eigvalsh(root @ (root @ moments).mT)
        return max(float(values[-1]), 0.0) if len(values) else 0.0

    def dense(self) -> Tensor:
        """H."""
        return self.floor * torch.eye(len(self.above), dtype=torch.float64) + self.above @ self.above.mT

    def root(self) -> Metric:
        """H^½."""
        root, more = self.floor**0.5, self.above.square().sum(0)
        ends = (self.floor + more).sqrt() + root  # √(floor + c) - √floor = c / (√(floor + c) + √floor)
        return Metric(root, self.above / ends.clamp_min(torch.finfo(torch.float64).tiny).sqrt())


def metric(factor: Tensor, aside: float = ASIDE, soft: float = SOFT) -> Metric:
    """How errors count for a task, by the second moments C Cᵀ of what its adapter adds, C being ``factor`` (p, r).

    With c the moments' eigenvalues: c / (c + soft · max c), brought between ``aside`` and 1.
    """
    vectors, sizes, _ = linalg.svd(factor)
    values = sizes.square()
    if not len(values) or not float(values[0]):
        return Metric.plain(len(factor))
    own = values / (values + soft * values[0])
    return Metric(aside, vectors * ((1 - aside) * own).sqrt())


@dataclass(frozen=True)
class Demand:
    """What one task asks of a module's core; means over its tokens times the task's weight.

    Attributes:
        metric: of (p, p), see :func:`metric`.
        zz: (q, q).
        yz: (p, q).
        yy: (p, p).
        given: (p, p) the covariance of what the module gives without an update.
    """

    metric: Metric
    zz: Tensor
    yz: Tensor
    yy: Tensor
    given: Tensor

    @property
    def size(self) -> float:
        """What no update at all would leave."""
        return self.metric.of(self.yy)

    @property
    def largest(self) -> float:
        """What it would leave in the one direction in which it leaves most."""
        return self.metric.largest(self.yy)

    def __mul__(self, weight: float) -> Demand:
        return Demand(self.metric, *(weight * x for x in (self.zz, self.yz, self.yy, self.given)))

    def residual(self, core: Tensor) -> float:
        """The mean of ‖core z − y‖² in the metric."""
        return self.metric.between(core, core @ self.zz - 2 * self.yz) + self.size


def means_of(sums: Mapping[str, Sums], metrics: Mapping[str, Metric]) -> dict[str, Demand]:
    """What each task that has tokens asks, per token."""
    return {task: s.means(metrics[task]) for task, s in sums.items() if s.count}


def weights_of(means: Mapping[str, Demand], preferences: Mapping[str, float]) -> dict[str, float]:
    """A task's preference, 1 by default, over its demand in the direction in which that is largest: see :data:`LEAST`.

    Large outputs then do not decide alone; nor does a task lose whose adapter writes in many directions, as it would if
    weights were one over the demand in all of them.
    """
    sizes = {task: max(one.largest, LEAST * one.metric.largest(one.given)) for task, one in means.items()}
    least = LEAST_OF_MEAN * sum(sizes.values()) / len(sizes) if sizes else 0.0
    return {task: preferences.get(task, 1.0) / (max(size, least) or 1.0) for task, size in sizes.items()}


def demands(sums: Mapping[str, Sums], metrics: Mapping[str, Metric], weights: Mapping[str, float]) -> list[Demand]:
    """Of the tasks that have tokens, and a weight above zero."""
    means = means_of(sums, metrics)
    return [demand * weights[task] for task, demand in means.items() if weights[task]]


def relative(asked: Sequence[Demand], core: Tensor) -> float:
    """The tasks' residuals as a share of what no update at all would leave."""
    size = sum(demand.size for demand in asked)
    return max(sum(demand.residual(core) for demand in asked), 0.0) / size if size else 0.0


def pull(asked: Sequence[Demand], ridge: float, own: int) -> float:
    """ρ: the ``ridge`` times the mean second moment of the inputs along the first ``own`` directions.

    These are the adapters' own: what else is read changes nothing in how strongly they are drawn to the prior.
    """
    along = sum(float(demand.zz.diagonal()[:own].sum()) for demand in asked)
    return max(ridge, linalg.RTOL) * along / max(own, 1)


def solve(asked: Sequence[Demand], prior: Tensor, rho: float, *, exact: float = EXACT) -> Tensor:
    """The core M (p, q) with the least Σ_k residual + ρ ‖M − prior‖², ``rho`` being what :func:`pull` gives.

    Its normal equations Σ_k H_k M S_k + ρ M = Σ_k H_k Y_k + ρ prior, by conjugate gradients from the prior; in one step
    where the tasks' metrics are equal, or their inputs' moments.
    """
    inputs = sum((demand.zz for demand in asked), torch.zeros(prior.shape[-1], prior.shape[-1], dtype=torch.float64))
    if not bool(inputs.diagonal().any()) or not prior.numel():  # nothing comes in: nothing can be asked
        return prior
    rho = max(rho, linalg.RTOL**2 * float(inputs.diagonal().mean()))
    size = sum(float(d.zz.diagonal().sum()) for d in asked)
    outputs = torch.stack([d.metric.dense() * (float(d.zz.diagonal().sum()) / size) for d in asked]).sum(0)
    floor = sum((d.metric.floor * d.zz for d in asked), rho * torch.eye(len(inputs), dtype=torch.float64))
    (high, left), (wide, right) = linalg.eigh(outputs), linalg.eigh(inputs)
    levels = high.clamp_min(0).unsqueeze(-1) * wide.clamp_min(0) + rho

    def applied(core: Tensor) -> Tensor:
        return sum((d.metric.above @ (d.metric.above.mT @ core @ d.zz) for d in asked), core @ floor)

    def nearly(rest: Tensor) -> Tensor:
        return left @ ((left.mT @ rest @ right) / levels) @ right.mT

    wanted = sum((d.metric @ (d.yz - prior @ d.zz) for d in asked), torch.zeros_like(prior))
    return prior + _conjugate_gradients(applied, nearly, wanted, exact)


def _conjugate_gradients(
    applied: Callable[[Tensor], Tensor], nearly: Callable[[Tensor], Tensor], wanted: Tensor, exact: float
) -> Tensor:
    """x with ``applied(x)`` = ``wanted``; ``nearly`` is almost its inverse."""
    found, rest = torch.zeros_like(wanted), wanted
    goal = exact * float(wanted.norm())
    step = nearly(rest)
    level = (rest * step).sum()
    for _ in range(STEPS):
        if float(rest.norm()) <= goal:
            break
        moved = applied(step)
        length = level / (step * moved).sum()
        found, rest = found + length * step, rest - length * moved
        turned = nearly(rest)
        level, before = (rest * turned).sum(), level
        step = turned + (level / before) * step
    return found


def cut(asked: Sequence[Demand], core: Tensor, rank: int, rho: float) -> Tensor:
    """The core of at most ``rank`` whose outputs on the inputs are nearest to those of ``core``.

    Reduced-rank regression: with S the inputs' second moments plus a little of the ridge, the top components of M S^½,
    times S^-½.
    """
    if rank >= min(core.shape):
        return core
    vectors, root = _root(asked, core, rho)
    left, sizes, right = linalg.svd((core @ vectors) * root)
    return (left[:, :rank] * sizes[:rank]) @ ((right[:rank] / root) @ vectors.mT)


def gains(asked: Sequence[Demand], core: Tensor, rho: float) -> Tensor:
    """What each component that :func:`cut` can keep adds to the outputs, as a share of what is asked; descending."""
    vectors, root = _root(asked, core, rho)
    _, sizes, _ = linalg.svd((core @ vectors) * root)
    size = sum(demand.size for demand in asked)
    return sizes.square() / size if size else torch.zeros_like(sizes)


def lost(gains: Tensor, rank: int | None) -> float:
    """The share of a core's outputs that a cut to ``rank`` loses, by its :func:`gains`; None: it is not cut."""
    whole = float(gains.sum())
    share = float(gains[rank:].sum()) / whole if rank is not None and whole else 0.0
    return share if share > linalg.NOISE else 0.0


def _root(asked: Sequence[Demand], core: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors (q, q) of S, and the roots (q) of its eigenvalues."""
    zz = sum((demand.zz for demand in asked), torch.zeros(core.shape[-1], core.shape[-1], dtype=torch.float64))
    values, vectors = linalg.eigh(zz)
    mean = float(zz.diagonal().mean())
    level = values.clamp_min(0) + max(METRIC * rho, linalg.RTOL * mean) if mean else torch.ones_like(values)
    return vectors, level.sqrt()


def allot(shares: Mapping[str, Tensor], budget: int, most: int | None = None) -> dict[str, int]:
    """Module → rank, ``budget`` on average, so that the components that are kept have the largest ``shares``.

    Every module keeps at least one, and none more than ``most``. Source: ours; greedy, which is optimal as shares
    descend within a module.
    """
    ranks = dict.fromkeys(shares, 1)
    listed = [(float(x), name) for name, values in shares.items() for x in values[1:most]]
    for _, name in sorted(listed, key=lambda one: -one[0])[: (budget - 1) * len(shares)]:
        ranks[name] += 1
    return ranks


def router(own: Mapping[str, Tensor], cores: Mapping[str, tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """The core of SSR-Merge: each task's inputs are led to its own adapter's components.

    Args:
        own: task → (q, q) second moments of Vᵀ x, x the inputs in the model with the task's adapter alone.
        cores: adapter → its factors (p, r), (r, q) in core space.
        ridge: relative to the mean diagonal.

    With z all adapters' components side by side and G_k = E[z zᵀ] over its trace,
    R = (Σ_k E_k G_k)(Σ_k G_k + λI)⁻¹, E_k keeping the rows of adapter k.

    Source: SSR-Merge, arXiv 2606.10617.
    """
    rights = torch.cat([right for _, right in cores.values()])
    lefts = torch.cat([left for left, _ in cores.values()], -1)
    edges, at = {}, 0
    for name, (_, right) in cores.items():
        edges[name] = slice(at, at + len(right))
        at += len(right)
    whole, wanted = torch.zeros(at, at, dtype=torch.float64), torch.zeros(at, at, dtype=torch.float64)
    for task, moments in own.items():
        gram = rights @ moments @ rights.mT
        trace = float(gram.diagonal().sum())
        if trace <= 0:
            continue
        whole += gram / trace
        if task in edges:
            wanted[edges[task]] += gram[edges[task]] / trace
    level = max(ridge, linalg.RTOL) * float(whole.diagonal().mean())
    if not level:
        return lefts @ rights
    return lefts @ linalg.solve(whole + level * torch.eye(at, dtype=torch.float64), wanted.mT).mT @ rights


def regmean(own: Mapping[str, Tensor], cores: Mapping[str, tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """RegMean in core space: (Σ_k M_k S_k)(Σ_k S_k + λI)⁻¹, S_k the second moments of task k's inputs.

    Args:
        own: see :func:`router`; only tasks whose adapter has the module count.
        cores: see :func:`router`.
        ridge: relative to the mean diagonal, in place of RegMean's smaller off-diagonals.

    Source: RegMean, arXiv 2212.09849; RegMean++, arXiv 2508.03121, with the moments in the merged model.
    """
    having = {task: moments for task, moments in own.items() if task in cores}
    if not having:
        return torch.cat([left for left, _ in cores.values()], -1) @ torch.cat([right for _, right in cores.values()])
    whole = sum(having.values(), torch.zeros_like(next(iter(having.values()))))
    wanted = torch.stack([cores[task][0] @ (cores[task][1] @ moments) for task, moments in having.items()]).sum(0)
    level = max(ridge, linalg.RTOL) * float(whole.diagonal().mean())
    eye = torch.eye(len(whole), dtype=torch.float64)
    return linalg.solve(whole + (level or 1.0) * eye, wanted.mT).mT
