"""The way of a fit through the model: block by block, the modules of a stage from sums over all tasks' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import InputError, UnsupportedError
from coremerge.learning.backbone import Batch, token_mask
from coremerge.learning.forward import MergedModel, Target
from coremerge.learning.kept import Kept
from coremerge.learning.leastsquares import (
    Sums,
    cut,
    demands,
    gains,
    means_of,
    metric,
    regmean,
    relative,
    router,
    shared,
    solve,
    weights_of,
)
from coremerge.learning.states import States
from coremerge.learning.stream import Segment, Stream, Updates, Watch
from coremerge.lowrank import LowRank, thin_svd
from coremerge.merging import Solved, read_updates, solved_of
from coremerge.plan import Plan
from coremerge.recipe import Recipe
from coremerge.spaces import Coordinates

Progress = Callable[[int, int], "bool | None"]

FOLDS = 4
"""Parts of the inputs: each is held out once, to see whether the fit is better there than its prior."""

FROM_INPUTS = {"router": router, "regmean": regmean, "regmean++": regmean}
IN_MERGED = "regmean++"
"""The one that sees inputs as the merged model has them."""
INPUTS_RIDGE = 1e-2
"""Of these priors."""

ROUGH = 1e-3
"""How exactly the fits are solved that are only compared with the prior."""


@dataclass(frozen=True)
class ModuleFit:
    """How one module was fitted.

    Attributes:
        tokens: that reached it, of all tasks.
        prior: held-out residual of the prior, as a share of what no update leaves.
        fitted: that of the fit.
        kept: the prior was kept, as the fit is not better.
    """

    tokens: int
    prior: float
    fitted: float
    kept: bool


@dataclass(frozen=True)
class Drawn:
    """What cores are drawn to, how strongly, how errors and tasks count, and the rank that (each) module is cut to."""

    prior: str | Adapter
    ridge: float
    aside: float
    rank: int | Mapping[str, int] | None
    preferences: Mapping[str, float] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Nothing is fitted: there is the prior alone."""
        return math.isinf(self.ridge)

    @property
    def own_inputs_do(self) -> bool:
        """Nothing is asked of the merged model."""
        return self.alone and self.prior != IN_MERGED

    def rank_of(self, name: str) -> int | None:
        """Of one module."""
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank


@dataclass(frozen=True)
class Core:
    """A module in core space.

    Attributes:
        coordinates: of the adapters that have it.
        left: U (m, p), float64.
        right: Vᵀ (q, n).
        holders: adapter → its factors (p, r), (r, q).
    """

    coordinates: Coordinates
    left: Tensor
    right: Tensor
    holders: Mapping[str, LowRank]

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.left.shape[-1], len(self.right)

    def of(self, update: LowRank) -> Tensor:
        """``update`` (m, n) in these coordinates (p, q)."""
        return (self.left.mT @ update.left) @ (update.right @ self.right.mT)

    def metric(self, task: str, moments: Mapping[str, Tensor], aside: float) -> Tensor:
        """How errors count for the task: by what its adapter adds to the outputs, on its own inputs."""
        held = self.holders.get(task)
        if held is None or task not in moments:
            return torch.eye(self.shape[0], dtype=torch.float64)
        return metric(held.left @ (held.right @ moments[task] @ held.right.mT) @ held.left.mT, aside)


class Fitting:
    """A fit on its way.

    Args:
        model: frozen.
        plan: the adapters, and what is merged.
        batches: task → inputs.
        drawn: see :class:`Drawn`.
        states: where hidden states go.
        kept: modules that are done already, and where others are put.

    Attributes:
        solved: module name → what was found.
        fits: how.
        gains: what each of its components brings: see :func:`~coremerge.learning.leastsquares.gains`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Mapping[str, Sequence[Batch]],
        drawn: Drawn,
        states: States,
        *,
        kept: Kept,
    ) -> None:
        self.plan, self.batches, self.drawn, self.states, self.kept = plan, batches, drawn, states, kept
        self.parts = Recipe(method="sum", steps=[]).parts()
        self.targets = MergedModel(model, plan.adapters).targets
        samples = (listed[0] for listed in batches.values())
        self.stream = Stream(model, self.targets, first_row(max(samples, key=len)))
        self._unreached: set[tuple[str, str]] = set()  # tasks whose inputs do not run a stack, as texts a vision tower
        self.solved: dict[str, Solved] = {}
        self.fits: dict[str, ModuleFit] = {}
        self.gains: dict[str, Tensor] = {}
        self.updates: dict[str, LowRank] = {}
        for name in self.stream.repeated:  # such a module acts on its own outputs before it is fitted
            core = self._core(name)
            self.updates[name] = self._in_model(name, core, self._prior(name, core, {}))

    def go(self, progress: Progress | None) -> None:
        """All modules.

        Raises:
            KeyboardInterrupt: ``progress`` returned False.
        """
        for at, segment in enumerate(self.stream.segments):
            cores = {name: self._core(name) for stage in segment.stages for name in stage}
            moments = self._own(at, segment, cores)
            for stage in segment.stages:
                if not self.kept.cores.keys() >= set(stage):
                    self._fit(at, {name: cores[name] for name in stage}, moments)
                for name in stage:
                    self._take(name, cores[name])
                self._tell(progress)
            self._pass_on(at, segment)
        for name in self.targets.keys() - self.solved.keys():
            core = self._core(name)
            self.kept.cores[name] = self._cut_plainly(name, self._prior(name, core, {}))
            self._take(name, core)
        self._tell(progress)

    def warnings(self) -> list[str]:
        """What the person should know."""
        said: list[str] = []
        if self.drawn.alone:
            return said
        kept, away = sum(one.kept for one in self.fits.values()), len(self.targets) - len(self.fits)
        if kept:
            said.append(f"{kept} of {len(self.fits)} modules keep the prior: the fit is not better on held-out inputs")
        if away:
            said.append(f"{away} of {len(self.targets)} modules keep the prior: no input reaches them")
        without = [name for name in self.plan.adapters if name not in self.batches]
        if without:
            said.append(f"no inputs for {', '.join(without)}: these count through the prior alone")
        if self.stream.apart:
            said.append(f"{', '.join(self.stream.apart)} cannot be run block by block: whole passes for each module")
        return said

    def _tell(self, progress: Progress | None) -> None:
        if progress and progress(len(self.solved), len(self.targets)) is False:
            raise KeyboardInterrupt

    def _core(self, name: str) -> Core:
        updates = read_updates((name,), self.plan, self.parts)
        coordinates = self.parts.space(updates)
        p, q = coordinates.cores[0].shape
        wide, high = torch.eye(p, q, dtype=torch.float64), torch.eye(q, dtype=torch.float64)
        left = coordinates.lift(LowRank(torch.eye(p, dtype=torch.float64), wide), updates).left
        right = coordinates.lift(LowRank(wide, high), updates).right
        named = zip(self.plan.adapters, coordinates.cores, strict=True)
        return Core(coordinates, left, right, {key: core for key, core in named if core.rank})

    def _own(self, at: int, segment: Segment, cores: Mapping[str, Core]) -> dict[str, dict[str, Tensor]]:
        """A pass of each task with its own adapter: what modules should give, and moments (q, q) of their inputs."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in cores}
        wanted = set(cores) - self.kept.cores.keys()
        alone: Updates = {}
        for task, j, batch in self._each(segment):
            alone = self._alone(task, at) if j == 0 else alone
            goals: dict[str, list[Tensor]] = {name: [] for name in wanted}

            def watch(name: str, x: Tensor, result: Tensor) -> None:
                if name in goals:  # noqa: B023
                    goals[name].append(in_basis(result, cores[name].left))  # noqa: B023
                    z = in_basis(x, cores[name].right.mT).double().cpu()
                    moments[name][task] = moments[name].get(task, 0) + z.mT @ z  # noqa: B023

            given = self.stream.run(batch, at, self._before("own", task, j), alone, _counting(batch, watch))
            if segment.block and given is None:
                self._unreached.add((task, segment.stack))
            else:
                self._after("own", task, j, at, given)
            for name, listed in () if self.drawn.own_inputs_do else goals.items():
                self.states["goal", task, j, name] = listed
        return moments

    def _alone(self, task: str, at: int) -> Updates:
        """The task's adapter, where the segment runs."""
        adapter = self.plan.adapters[task]
        near = [name for name in self.stream.running(at) if name in adapter]
        return {name: in_model(adapter.read(name), self.targets[name]) for name in near}

    def _fit(self, at: int, cores: Mapping[str, Core], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The modules of one stage."""
        if self.drawn.own_inputs_do:
            for name, core in cores.items():
                self.kept.put(name, self._cut_plainly(name, self._prior(name, core, moments[name])), {})
            return self.kept.write()
        sums = self._sums(at, cores)
        for name, core in cores.items():
            self._check_finite(name, sums[name])
            self.kept.put(name, *self._settled(name, sums[name], core, moments[name]))
        return self.kept.write()

    def _check_finite(self, name: str, parts: list[dict[str, Sums]]) -> None:
        for task, sums in shared(parts).items():
            if not bool(sums.zz.isfinite().all() & sums.yy.isfinite().all()):
                raise InputError(
                    f"on the inputs of {task} the model's numbers are not finite", key=name,
                    remedy="Check the inputs, or run the base model in float32 or bfloat16",
                )  # fmt: skip

    def _sums(self, at: int, cores: Mapping[str, Core]) -> dict[str, list[dict[str, Sums]]]:
        """Module → part of the inputs → task → sums, in the merged model as it is so far."""
        sums = {
            name: [{task: Sums.zero(*core.shape) for task in self.batches} for _ in range(FOLDS)]
            for name, core in cores.items()
        }
        before = dict.fromkeys(self.batches, 0)
        for task, j, batch in self._each(self.stream.segments[at]):
            goals = {name: iter(self.states["goal", task, j, name]) for name in cores}

            def watch(name: str, x: Tensor, output: Tensor, rows: Tensor) -> None:
                if name not in goals:  # noqa: B023
                    return
                goal = next(goals[name]).to(output.device)  # noqa: B023
                if len(goal) != len(x):
                    raise UnsupportedError(
                        "the inputs of a task take another way through the merged model than through their own",
                        key=name, remedy="Leave out adapters of experts, or merge without data",
                    )  # fmt: skip
                z, y = in_basis(x, cores[name].right.mT), goal - in_basis(output, cores[name].left)
                part = (rows + before[task]) % FOLDS  # noqa: B023
                for fold in range(FOLDS):
                    sums[name][fold][task].add(z[part == fold], y[part == fold])  # noqa: B023

            before_it, updates = self._inputs(at, task, j)
            self.stream.run(batch, at, before_it, updates, _plain(batch, watch), until=list(cores))
            for name in cores:
                self.states.drop(("goal", task, j, name))
            before[task] += rows_of(batch)
        return sums

    def _inputs(self, at: int, task: str, j: int) -> tuple[Mapping[str, Any], Updates]:
        """Through what a batch comes to the modules that are fitted: the merged model, as it is so far."""
        return self._before("merged", task, j), self.updates

    def _pass_on(self, at: int, segment: Segment) -> None:
        """What the finished block gives in the merged model."""
        if not segment.block or at == len(self.stream.segments) - 1 or self.drawn.own_inputs_do:
            return
        for task, j, batch in self._each(segment):
            given = self.stream.run(batch, at, self._before("merged", task, j), self.updates, _nothing)
            self._after("merged", task, j, at, given)

    def _before(self, way: str, task: str, j: int) -> Mapping[str, Any]:
        """What finished blocks gave: see :meth:`Stream.run`."""
        blocks = (segment.block for segment in self.stream.segments if segment.block)
        return {block: self.states[way, task, j, block] for block in blocks if (way, task, j, block) in self.states}

    def _after(self, way: str, task: str, j: int, at: int, given: Any) -> None:
        block = self.stream.segments[at].block
        if block:
            self.states[way, task, j, block] = given
            needed = self.stream.tail(at)
            for segment in self.stream.segments[:at]:
                if segment.block and segment.block not in needed:
                    self.states.drop((way, task, j, segment.block))

    def _each(self, segment: Segment) -> Iterator[tuple[str, int, Batch]]:
        """The batches that reach the segment, as far as that is known."""
        for task, listed in self.batches.items():
            for j, batch in enumerate(listed):
                if (task, segment.stack) not in self._unreached:
                    yield task, j, batch

    def _settled(
        self, name: str, parts: list[dict[str, Sums]], core: Core, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The core of one module, and what there is to say of it: nothing, if no token reached it."""
        sums = shared(parts)
        in_merged = self.drawn.prior == IN_MERGED
        prior = self._prior(name, core, {t: s.zz for t, s in sums.items() if s.count} if in_merged else moments)
        metrics = {task: core.metric(task, moments, self.drawn.aside) for task in sums}
        weights = weights_of(means_of(sums, metrics), self.drawn.preferences)
        asked = demands(sums, metrics, weights)
        if not asked or self.drawn.alone:
            return self._cut_plainly(name, prior), {}
        ridge, rank = self.drawn.ridge, self.drawn.rank_of(name)
        before = after = 0.0
        for held in parts:
            others = shared([part for part in parts if part is not held])
            seen, rest = demands(held, metrics, weights), demands(others, metrics, weights)
            if seen and rest:
                before += relative(seen, prior) / FOLDS
                after += relative(seen, solve(rest, prior, ridge, exact=ROUGH)) / FOLDS
        said = ModuleFit(sum(s.count for s in sums.values()), before, after, kept=after > before)
        found = prior if said.kept else solve(asked, prior, ridge)
        told = {"fit": asdict(said), "gains": gains(asked, found, ridge).tolist()}
        return (found if rank is None else cut(asked, found, rank, ridge)), told

    def _cut_plainly(self, name: str, core: Tensor) -> Tensor:
        rank = self.drawn.rank_of(name)
        return core if rank is None else thin_svd(core).truncate(rank).dense()

    def _prior(self, name: str, core: Core, moments: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.drawn.prior, Adapter):
            return core.of(self.drawn.prior[name])
        if self.drawn.prior in FROM_INPUTS:
            factors = {key: (held.left, held.right) for key, held in core.holders.items()}
            return FROM_INPUTS[self.drawn.prior](moments, factors, INPUTS_RIDGE)
        return torch.zeros(core.shape, dtype=torch.float64)

    def _take(self, name: str, core: Core) -> None:
        """A core that is done."""
        found = self.kept.cores[name]
        (self.solved[name],) = solved_of((name,), core.coordinates, thin_svd(found).cut(), self.plan)
        self.updates[name] = self._in_model(name, core, found)
        if self.kept.said.get(name):
            self.fits[name] = ModuleFit(**self.kept.said[name]["fit"])
            self.gains[name] = torch.tensor(self.kept.said[name]["gains"], dtype=torch.float64)

    def _in_model(self, name: str, core: Core, found: Tensor) -> LowRank:
        small = thin_svd(found).cut().lowrank()
        return in_model(LowRank(core.left @ small.left, small.right @ core.right), self.targets[name])


def in_basis(x: Tensor, basis: Tensor) -> Tensor:
    """``x`` (tokens, m) in the orthonormal ``basis`` (m, p), at least in float32."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind) @ basis.to(x.device, kind)


def in_model(update: LowRank, target: Target) -> LowRank:
    """As the model's module runs."""
    return LowRank(update.left.to(target.left), update.right.to(target.left))


def rows_of(batch: Batch) -> int:
    """Inputs of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def first_row(batch: Batch) -> Batch:
    """The batch with one input, where its tensors are all of as many rows."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if any(len(value) != rows_of(batch) for value in tensors.values()):
        return batch
    return {key: value[:1] if key in tensors else value for key, value in batch.items()}


def _tokens(batch: Batch, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a module's inputs ``x`` and outputs ``y`` (..., n), those that count (tokens, n); and the row of each."""
    mask = token_mask(batch, x)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    each, rest = divmod(len(x), rows_of(batch))
    rows = torch.arange(len(x), device=x.device)
    rows = rows // each if each and not rest else torch.zeros_like(rows)
    if mask is None:
        return x, y, rows
    counts = mask.reshape(-1).bool().to(x.device)
    return x[counts], y[counts], rows[counts]


def _counting(batch: Batch, see: Callable[[str, Tensor, Tensor], None]) -> Watch:
    """``see`` a module's inputs and outputs with its update, of the tokens that count."""

    def watch(name: str, x: Tensor, output: Tensor, result: Tensor) -> None:
        x, result, _ = _tokens(batch, x, result)
        see(name, x, result)

    return watch


def _plain(batch: Batch, see: Callable[[str, Tensor, Tensor, Tensor], None]) -> Watch:
    """``see`` a module's inputs, its outputs without an update, and their rows, of the tokens that count."""
    return lambda name, x, output, result: see(name, *_tokens(batch, x, output))


def _nothing(name: str, x: Tensor, output: Tensor, result: Tensor) -> None:
    pass
