"""The best of many merges: tuned on validation rows under one budget each, then scored once on the test rows.

A merged update is linear in its scale, so that a merge is made once and scored at every scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError
from coremerge.evaluation.plan import MEAN, PLAN, Merge, Plan, combinations, recipe_of
from coremerge.evaluation.scales import Scales, walk
from coremerge.evaluation.scoring import Evaluator, Scores
from coremerge.evaluation.taskset import Split, TaskSet, read_taskset
from coremerge.executors import Executor, remembered
from coremerge.formats import load
from coremerge.formats.source import in_full
from coremerge.inputs import Progress, read_adapters
from coremerge.learning.backbone import NotFiniteError
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult, merge
from coremerge.recipe import Recipe, write_recipe


@dataclass(frozen=True)
class Tried:
    """One validation score."""

    parameters: Mapping[str, Any]
    scale: float
    score: float


@dataclass(frozen=True)
class Tuned:
    """One merge at its best.

    Attributes:
        label: of the plan.
        parameters: those that were chosen.
        recipe: with the chosen parameters and scale.
        validation: its score there: see :func:`value_of`.
        scores: on the test rows, once.
        tried: everything that was scored.
        stopped: the budget ended the search.
        seconds: spent on it.
    """

    label: str
    parameters: Mapping[str, Any]
    recipe: Recipe
    validation: float
    scores: Scores
    tried: tuple[Tried, ...]
    stopped: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "label": self.label,
            "recipe": self.recipe.model_dump(mode="json"),
            "validation": self.validation,
            "test": self.scores.to_dict(),
            "tried": [vars(one) | {"parameters": dict(one.parameters)} for one in self.tried],
            "stopped_by_budget": self.stopped,
            "seconds": self.seconds,
        }


@dataclass
class _Tuning:
    """One merge's search so far."""

    evaluator: Evaluator
    adapters: Mapping[str, Adapter]
    plan: Plan
    merge: Merge
    tell: Callable[[int], None]
    tried: list[Tried] = field(default_factory=list)
    best: tuple[Tried, MergeResult] | None = None
    results: dict[str, tuple[MergeResult, dict[str, LowRank]]] = field(default_factory=dict)
    failed: NotFiniteError | None = None

    def try_parameters(self, parameters: Mapping[str, Any], scales: Scales) -> None:
        """Score the merge with ``parameters`` at ``scales``."""
        result, updates = self._merged(parameters)
        own = result.report.scale

        def score(scale: float) -> float:
            self._check_budget()
            try:
                found = value_of(self.evaluator.score(updates, "validation", scale / own), self.plan.target)
            except NotFiniteError as error:  # too strong a scale
                self.failed = error
                return -math.inf
            one = Tried(parameters, scale, found)
            self.tried.append(one)
            self.tell(len(self.tried))
            if self.best is None or found > self.best[0].score:
                self.best = one, result
            return found

        walk(score, scales, own)

    def _check_budget(self) -> None:
        if len(self.tried) >= self.plan.budget:
            raise _BudgetError

    def _merged(self, parameters: Mapping[str, Any]) -> tuple[MergeResult, dict[str, LowRank]]:
        key = repr(sorted(parameters.items()))
        if key not in self.results:
            result = merge(self.adapters, recipe_of(self.merge, parameters))
            self.results.clear()  # one at a time in memory
            self.results[key] = result, dict(result.adapter)
        return self.results[key]

    def run(self) -> bool:
        """Whether the budget ended it."""
        try:
            if self.plan.order == "grid":
                for parameters in combinations(self.merge.tried):
                    self.try_parameters(parameters, self.plan.scales)
            else:
                self._by_coordinate()
        except _BudgetError:
            return True
        return False

    def _by_coordinate(self) -> None:
        first = {key: values[0] for key, values in self.merge.tried.items()}
        self.try_parameters(first, self.plan.scales)
        for key, values in self.merge.tried.items():
            for value in values[1:]:
                best = self._chosen().parameters
                self.try_parameters({**best, key: value}, Scales(values=(self._chosen().scale,)))

    def _chosen(self) -> Tried:
        if self.best is None:
            raise self.failed or ConfigError("no scale to try", key="scales")
        return self.best[0]


class _BudgetError(Exception):
    pass


def search(
    evaluator: Evaluator,
    adapters: Mapping[str, Adapter],
    plan: Plan,
    *,
    intervals: bool = True,
    progress: Progress | None = None,
) -> list[Tuned]:
    """Tune every merge of ``plan`` on validation rows, and score each at its best once on the test rows.

    Args:
        evaluator: of the task set.
        adapters: name → adapter, those that are merged.
        plan: what is tried.
        intervals: of the test scores.
        progress: called after every score.

    Returns:
        In the plan's order; :func:`winner` chooses.

    Raises:
        ConfigError: the task set has no such target.
    """
    check_target(plan, evaluator.taskset)
    found = []
    for at, one in enumerate(plan.merges):

        def tell(count: int, at: int = at, label: str = one.label) -> None:
            if progress:
                progress(f"{label}: {count} tried", at, len(plan.merges))

        found.append(tune(_Tuning(evaluator, adapters, plan, one, tell), intervals))
    return found


def tune(tuning: _Tuning, intervals: bool = True) -> Tuned:
    """One merge of the plan."""
    start, merge = time.perf_counter(), tuning.merge
    stopped = tuning.run()
    chosen = tuning._chosen()
    result, updates = tuning._merged(chosen.parameters)
    scores = tuning.evaluator.score(updates, "test", chosen.scale / result.report.scale, intervals=intervals)
    recipe = recipe_of(merge, chosen.parameters, scale=chosen.scale)
    seconds = time.perf_counter() - start
    return Tuned(merge.label, chosen.parameters, recipe, chosen.score, scores, tuple(tuning.tried), stopped, seconds)


def winner(found: Sequence[Tuned]) -> Tuned:
    """The best on validation rows: test rows choose nothing."""
    return max(found, key=lambda one: one.validation)


def value_of(scores: Scores, target: str = MEAN) -> float:
    """What is tuned for.

    The accuracy of a joint group; else the mean of normalised scores, or of raw ones where tasks have no adapter.
    """
    if target != MEAN:
        return scores.joint[target]
    return scores.mean_raw if math.isnan(scores.mean) else scores.mean


def margin_of(scores: Scores, target: str = MEAN) -> float:
    """Half the 95 % interval of :func:`value_of`; NaN where it was not asked for, and of raw means."""
    if target == MEAN:
        return scores.margin
    low, high = scores.intervals.get(target, (math.nan, math.nan))
    return (high - low) / 2


def check_target(plan: Plan, taskset: TaskSet) -> None:
    """Refuse a target that the task set does not have.

    Raises:
        ConfigError: there is no such joint group.
    """
    if plan.target != MEAN and plan.target not in taskset.joint:
        known = ", ".join((MEAN, *taskset.joint))
        raise ConfigError(
            "the task set has no such joint group", key="target", value=plan.target, remedy=f"Take one of {known}"
        )


@dataclass(frozen=True)
class Found:
    """What :func:`search_files` found.

    Attributes:
        name: of the task set.
        models: where the adapters are.
        rows: see :func:`search`.
        nothing: scores of no adapter on the test rows.
        target: that was tuned for: see :class:`~coremerge.evaluation.plan.Plan`.
    """

    name: str
    models: tuple[str, ...]
    rows: tuple[Tuned, ...]
    nothing: Scores
    target: str = MEAN

    @property
    def winner(self) -> Tuned:
        """See :func:`winner`."""
        return winner(self.rows)

    def recipe(self) -> str:
        """The winner as a recipe file, adapters included: ``coremerge merge --recipe`` does it again."""
        return write_recipe(self.winner.recipe, self.models)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "models": list(self.models),
            "target": self.target,
            "winner": self.winner.label,
            "no_adapter": self.nothing.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
        }


def search_files(
    tasks: str | Path,
    plan: Plan | None = None,
    sources: Sequence[str | Path] = (),
    *,
    base: str | Path | None = None,
    limits: Mapping[Split, int] | None = None,
    device: str = "cpu",
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search for the best merge of ``sources`` on a task set.

    Args:
        tasks: the task set: see :func:`~coremerge.evaluation.read_taskset`.
        plan: what is tried; :data:`~coremerge.evaluation.plan.PLAN` by default.
        sources: adapters; by default the tasks' own.
        base: the base model, if it is not the task set's.
        limits: rows of each split and task, the first ones.
        device: of the base model.
        executor: other processes that tune one merge each, such as :class:`coremerge.executors.ray.Ray`.
        progress: called after every score; with an executor, after every merge.

    Raises:
        CoremergeError: a refusal that says what to do.
    """
    plan = plan or PLAN
    asked = Asked(str(tasks), plan, tuple(map(str, sources)), None if base is None else str(base), limits, device)
    evaluator, given = _open(asked)
    taskset = evaluator.taskset
    models = tuple(map(str, sources or taskset.own().values()))
    if executor:
        tuned = executor.run(partial(_tune, asked.absolute()), range(len(plan.merges)), lambda _: 60.0, lambda at: at)
        rows = [*_told(tuned, plan, progress)]
    else:
        rows = search(evaluator, given, plan, progress=progress)
    return Found(taskset.name, models, tuple(rows), evaluator.score({}, "test"), plan.target)


@dataclass(frozen=True)
class Asked:
    """A search, in a form that can be sent: see :func:`search_files`."""

    tasks: str
    plan: Plan
    sources: tuple[str, ...]
    base: str | None
    limits: Mapping[Split, int] | None
    device: str

    def absolute(self) -> Asked:
        """With all paths in full."""
        sources = tuple(map(in_full, self.sources))
        return replace(self, tasks=in_full(self.tasks), sources=sources, base=self.base and in_full(self.base))


def _open(asked: Asked) -> tuple[Evaluator, Mapping[str, Adapter]]:
    taskset = read_taskset(asked.tasks)
    check_target(asked.plan, taskset)
    own = {name: load(path) for name, path in taskset.own().items()}
    if not asked.sources and not own:
        raise InputError("nothing to merge", remedy="Name the adapters: the tasks have none of their own")
    given = read_adapters(asked.sources, base=asked.base) if asked.sources else own
    return Evaluator(taskset, own, asked.limits, base=asked.base, device=asked.device), given


_opened = remembered(_open)


def _tune(asked: Asked, at: int) -> Tuned:
    evaluator, given = _opened(asked)
    return tune(_Tuning(evaluator, given, asked.plan, asked.plan.merges[at], lambda count: None))


def _told(tuned: Iterable[Tuned], plan: Plan, progress: Progress | None) -> Iterator[Tuned]:
    for done, one in enumerate(tuned, 1):
        if progress:
            progress("tuned", done, len(plan.merges))
        yield one
