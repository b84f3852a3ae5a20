"""The way of a fit through the model: block by block, the modules of a stage from sums over all tasks' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import merge
from typing import Any, TypeVar

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.errors import InputError
from coremerge.executors import Group
from coremerge.learning.beyond import Sketch, directions
from coremerge.learning.cores import Core, Cores
from coremerge.learning.kept import Kept
from coremerge.learning.leastsquares import (
    Sums,
    cut,
    demands,
    gains,
    lost,
    means_of,
    pull,
    regmean,
    relative,
    router,
    shared,
    solve,
    weights_of,
)
from coremerge.learning.passes import FOLDS, Layout
from coremerge.learning.stream import Segment
from coremerge.lowrank import thin_svd
from coremerge.merging import Solved, solved_of
from coremerge.patterns import listed
from coremerge.plan import Plan

Progress = Callable[[int, int], "bool | None"]

T = TypeVar("T")
ByTask = dict[str, dict[str, T]]
"""Module → task → what there is."""

FROM_INPUTS = {"router": router, "regmean": regmean, "regmean++": regmean}
IN_MERGED = "regmean++"
"""The one that sees inputs as the merged model has them."""
INPUTS_RIDGE = 1e-2
"""Of these priors."""

ROUGH = 1e-3
"""How exactly the fits are solved that are only compared with the prior."""

NOTABLE = 1e-2
"""A cut that loses more than this share of the outputs, on average over modules, is warned of."""


@dataclass(frozen=True)
class ModuleFit:
    """How one module was fitted.

    Attributes:
        tokens: that reached it, of all tasks.
        prior: held-out residual of the prior, as a share of what no update leaves.
        fitted: that of the fit.
        kept: the prior was kept, as the fit is not better.
        checked: there were inputs to hold out; else both residuals are 0.
        lost: share of the merged outputs on the inputs, in squares, that the cut to a rank lost.
        beyond: directions of its inputs that it reads besides those that the adapters read.
    """

    tokens: int
    prior: float
    fitted: float
    kept: bool
    checked: bool = True
    lost: float = 0.0
    beyond: int = 0


@dataclass(frozen=True)
class Drawn:
    """What cores are drawn to, how strongly, how errors and tasks count, the rank that (each) module is cut to, and how
    many directions it reads beyond the adapters' own.
    """

    prior: str | Adapter
    ridge: float
    aside: float
    rank: int | Mapping[str, int] | None
    preferences: Mapping[str, float] = field(default_factory=dict)
    beyond: int = 0

    @property
    def alone(self) -> bool:
        """Nothing is fitted: there is the prior alone."""
        return math.isinf(self.ridge)

    @property
    def own_inputs_do(self) -> bool:
        """Nothing is asked of the merged model."""
        return self.alone and self.prior != IN_MERGED

    def as_it_is(self, plan: Plan) -> bool:
        """A single adapter is drawn to itself: there is nothing to fit."""
        return len(plan.adapters) == 1 and self.prior is next(iter(plan.adapters.values()))

    def rank_of(self, name: str) -> int | None:
        """Of one module."""
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank


class Fitting:
    """A fit on its way.

    Args:
        group: the inputs' side, one or more :class:`~coremerge.learning.passes.Passes`.
        layout: of their model.
        tasks: that have inputs, in order.
        drawn: see :class:`Drawn`.
        kept: modules that are done already, and where others are put.
        cores: of the adapters.

    Attributes:
        solved: module name → what was found.
        fits: how.
        gains: what each of its components brings: see :func:`~coremerge.learning.leastsquares.gains`.
        reached: module name → tokens that came to it, of those that were not fitted.
        ran: names of modules that some input ran.
    """

    def __init__(
        self, group: Group, layout: Layout, tasks: Sequence[str], drawn: Drawn, *, kept: Kept, cores: Cores
    ) -> None:
        self.group, self.layout, self.tasks, self.drawn, self.kept, self.cores = (
            group,
            layout,
            tasks,
            drawn,
            kept,
            cores,
        )
        self.solved: dict[str, Solved] = {}
        self.fits: dict[str, ModuleFit] = {}
        self.gains: dict[str, Tensor] = {}
        self.reached: dict[str, int] = {}
        self.ran: set[str] = set()

    @property
    def plan(self) -> Plan:
        """The adapters, and what is merged."""
        return self.cores.plan

    def go(self, progress: Progress | None) -> None:
        """All modules.

        Raises:
            KeyboardInterrupt: ``progress`` returned False.
        """
        # a module that runs several times acts on its own outputs before it is fitted
        self._tell_all("begin", {name: self._prior(name, self.cores[name], {}) for name in self.layout.repeated})
        for at, segment in enumerate(self.layout.segments):
            names = {name for stage in segment.stages for name in stage}
            self.cores.hold(names)
            moments, sketches = self._own(at, names)
            self._widen(segment, sketches)
            for stage in segment.stages:
                if not self.kept.cores.keys() >= set(stage):
                    self._fit(at, stage, moments)
                self._take(stage)
                self._tell_all("take", {name: self.kept.cores[name] for name in stage})
                self._tell(progress)
            if self._goes_on(at, segment):
                self._tell_all("pass_on", at)
        for name in self.plan.modules:
            if name not in self.solved:
                self.kept.put(name, *self._cut_plainly(name, self._prior(name, self.cores[name], {})))
                self._take([name])
        self.ran.update(*self.group.ask("ran_modules"))
        self._tell(progress)

    def warnings(self) -> list[str]:
        """What the person should know."""
        if self.drawn.alone:
            return []
        if self.drawn.as_it_is(self.plan):
            cut = mean_lost(self.fits) or any(one.report.lost for one in self.solved.values())
            but = ", but for the cut to a rank" if cut else ""
            return [f"a single adapter comes back as it is{but}", *self._cuts()]
        said = [*self._priors(), *self._cuts()]
        without = [name for name in self.plan.adapters if name not in self.tasks]
        if without:
            said.append(f"no inputs for {', '.join(without)}: these {self._without_inputs()}")
        if self.layout.apart:
            said.append(f"{', '.join(self.layout.apart)} cannot be run block by block: whole passes for each module")
        return said

    def _without_inputs(self) -> str:
        if isinstance(self.drawn.prior, Adapter):
            return "count through the prior alone"
        return f"do not count where others' inputs run, as the prior ({self.drawn.prior}) does not hold them"

    def _priors(self) -> Iterator[str]:
        """Where priors stand, or might have to."""
        fits, targets = self.fits.values(), len(self.plan.modules)
        kept, unchecked = sum(one.kept for one in fits), sum(not one.checked for one in fits)
        if kept:
            yield f"{kept} of {len(fits)} modules keep the prior: the fit is not better on held-out inputs"
        if unchecked:
            yield (
                f"too few inputs to hold some out: {unchecked} of {len(fits)} modules are not checked against the prior"
            )
        left: dict[str, list[str]] = {}
        for name in self.plan.modules:
            if name not in self.fits:
                left.setdefault(self._why_left(name), []).append(name)
        for why, names in left.items():
            yield f"{len(names)} of {targets} modules keep the prior: {why}: {listed(dict.fromkeys(names, ''))}"

    def _why_left(self, name: str) -> str:
        """Why a module is not fitted."""
        if self.reached.get(name):
            return "only inputs of tasks whose preference is 0 reach them"
        if name not in self.ran:
            return "no input reaches them"
        ordered = any(name in stage for segment in self.layout.segments for stage in segment.stages)
        return "no token that counts reaches them" if ordered else "only some inputs run them, as experts"

    def _cuts(self) -> Iterator[str]:
        """What ranks took away, where it is notable."""
        mean = mean_lost(self.fits)
        if mean > NOTABLE:
            name, most = max(self.fits.items(), key=lambda one: one[1].lost)
            yield (
                f"the cut to rank loses {mean:.1%} of the merged outputs on the inputs, on average over modules; most"
                f" in {name}: {most.lost:.1%}"
            )

    def _tell(self, progress: Progress | None) -> None:
        if progress and progress(len(self.solved), len(self.plan.modules)) is False:
            raise KeyboardInterrupt

    def _tell_all(self, method: str, *given: Any) -> None:
        for _ in self.group.call(method, *given):
            pass

    def _goes_on(self, at: int, segment: Segment) -> bool:
        """Whether a later segment is run behind this one."""
        return bool(segment.block) and at < len(self.layout.segments) - 1 and not self.drawn.own_inputs_do

    def _by_task(self, method: str, at: int, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Task and what each module has of it, lot by lot in their order, whoever has them."""
        order = {task: i for i, task in enumerate(self.tasks)}
        for task, _, found in merge(*self.group.call(method, at, names), key=lambda lot: (order[lot[0]], lot[1])):
            yield task, found

    def _own(self, at: int, names: Collection[str]) -> tuple[ByTask[Tensor], ByTask[Sketch]]:
        """A pass of each task with its own adapter: moments (q, q) of the modules' inputs, and sketches."""
        moments: ByTask[Tensor] = {name: {} for name in names}
        sketches: ByTask[Sketch] = {}
        for task, (seen, sketched) in self._by_task("own", at, sorted(names - self.kept.cores.keys())):
            for name, of_lot in seen.items():
                moments[name][task] = moments[name].get(task, 0) + of_lot
            for name, one in sketched.items():
                tasks = sketches.setdefault(name, {})
                tasks[task] = tasks[task] + one if task in tasks else one
        return moments, sketches

    def _widen(self, segment: Segment, sketches: ByTask[Sketch]) -> None:
        """Let the modules of a segment read directions of their inputs that no adapter reads."""
        rows = {}
        for stage in segment.stages:
            for name in stage:
                if name in self.kept.beyond:
                    rows[name] = self.kept.beyond.pop(name)
                elif stage[0] in sketches:
                    found = sketches[stage[0]].items()
                    counting = [one for task, one in found if self.drawn.preferences.get(task, 1.0)]
                    core = self.cores[name]
                    rows[name] = directions(counting, core.right[: core.own], self.drawn.beyond)
        self.cores.widen(rows)
        self._tell_all("widen", rows)

    def _fit(self, at: int, stage: Sequence[str], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The modules of one stage."""
        if self.drawn.own_inputs_do:
            for name in stage:
                self.kept.put(name, *self._cut_plainly(name, self._prior(name, self.cores[name], moments[name])))
            return self.kept.write()
        sums = self._sums(at, stage)
        for name in stage:
            self._check_finite(name, sums[name])
            core = self.cores[name]
            self.kept.put(name, *self._settled(name, sums[name], core, moments[name]), core.right[core.own :])
        return self.kept.write()

    def _check_finite(self, name: str, parts: list[dict[str, Sums]]) -> None:
        for task, sums in shared(parts).items():
            if not bool(sums.zz.isfinite().all() & sums.yy.isfinite().all()):
                raise InputError(
                    f"on the inputs of {task} the model's numbers are not finite", key=name,
                    remedy="Check the inputs, or run the base model in float32 or bfloat16",
                )  # fmt: skip

    def _sums(self, at: int, stage: Sequence[str]) -> dict[str, list[dict[str, Sums]]]:
        """Module → part of the inputs → task → sums, in the merged model as it is so far."""
        sums = {
            name: [{task: Sums.zero(*self.cores[name].shape) for task in self.tasks} for _ in range(FOLDS)]
            for name in stage
        }
        for task, found in self._by_task("sums", at, stage):
            for name, folds in found.items():
                for part, more in zip(sums[name], folds, strict=True):
                    part[task] += more
        return sums

    def _settled(
        self, name: str, parts: list[dict[str, Sums]], core: Core, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The core of one module, and what there is to say of it: nothing, if no token reached it."""
        sums = shared(parts)
        in_merged = self.drawn.prior == IN_MERGED
        own, ridge = core.own, self.drawn.ridge
        seen = {t: s.zz[:own, :own] for t, s in sums.items() if s.count} if in_merged else moments
        prior = self._prior(name, core, seen)
        metrics = {task: core.metric(task, moments, self.drawn.aside) for task in sums}
        weights = weights_of(means_of(sums, metrics), self.drawn.preferences)
        asked = demands(sums, metrics, weights)
        tokens = sum(one.count for one in sums.values())
        if not asked or self.drawn.alone:
            plain, energy = self._cut_plainly(name, prior)
            return plain, energy | {"tokens": tokens}
        rank = self.drawn.rank_of(name)
        before = after = 0.0
        checked = False
        for held in parts:
            others = shared([part for part in parts if part is not held])
            unseen, rest = demands(held, metrics, weights), demands(others, metrics, weights)
            if unseen and rest:
                checked = True
                before += relative(unseen, prior) / FOLDS
                after += relative(unseen, solve(rest, prior, pull(rest, ridge, own), exact=ROUGH)) / FOLDS
        kept = after > before
        rho = pull(asked, ridge, own)
        found = prior if kept else solve(asked, prior, rho)
        gained = gains(asked, found, rho)
        said = ModuleFit(tokens, before, after, kept, checked, lost(gained, rank), core.shape[1] - own)
        told: dict[str, Any] = {"fit": asdict(said), "gains": gained.tolist()}
        return (found if rank is None else cut(asked, found, rank, rho)), told

    def _cut_plainly(self, name: str, core: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A core that no inputs say how to cut, and the energy that it had."""
        rank = self.drawn.rank_of(name)
        if rank is None or rank >= min(core.shape):
            return core, {}
        return thin_svd(core).truncate(rank).dense(), {"energy": float(core.square().sum())}

    def _prior(self, name: str, core: Core, moments: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.drawn.prior, Adapter):
            return core.of(self.drawn.prior[name])
        if self.drawn.prior in FROM_INPUTS:
            factors = {key: (held.left, held.right) for key, held in core.holders.items()}
            found = FROM_INPUTS[self.drawn.prior](moments, factors, INPUTS_RIDGE)
            return torch.nn.functional.pad(found, (0, core.shape[1] - found.shape[1]))
        return torch.zeros(core.shape, dtype=torch.float64)

    def _take(self, names: Sequence[str]) -> None:
        """Cores that are done."""
        for name in names:
            found, said = self.kept.cores[name], self.kept.said[name]
            (solved,) = solved_of((name,), *self.cores[name].placed(found), self.plan)
            self.solved[name] = _with_energy(solved, said["energy"]) if said.get("energy") else solved
            self.reached[name] = said.get("tokens", 0)
            if "fit" in said:
                self.fits[name] = ModuleFit(**said["fit"])
                self.gains[name] = torch.tensor(said["gains"], dtype=torch.float64)


def mean_lost(fits: Mapping[str, ModuleFit]) -> float:
    """Of all modules, see :class:`ModuleFit`."""
    return sum(one.lost for one in fits.values()) / len(fits) if fits else 0.0


def _with_energy(solved: Solved, energy: float) -> Solved:
    """What was cut before it was solved, with the ``energy`` that it had."""
    left = solved.report.energy
    return replace(solved, report=replace(solved.report, energy=energy, lost=max(0.0, 1 - left / energy)))
