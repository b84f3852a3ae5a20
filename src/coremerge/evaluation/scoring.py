"""Scores of updates on a task set: raw, relative to each task's own adapter, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from coremerge.evaluation.answering import ChoiceScorer, GenerationScorer
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.harness import HarnessScorer
from coremerge.evaluation.head_scorer import Classifier, HeadScorer
from coremerge.evaluation.heads import Head
from coremerge.evaluation.metrics import Interval
from coremerge.evaluation.scorer import Groups, Scored, Scorer
from coremerge.evaluation.taskset import Split, TaskSet
from coremerge.lowrank import LowRank

Updates = Mapping[str, LowRank]


@dataclass(frozen=True)
class Scores:
    """One update's scores.

    Attributes:
        raw: task → the task's metric.
        normalised: task → raw over that of the task's own adapter (the other way round for errors; of a log-likelihood,
            the own adapter's perplexity over this one), of the tasks that have one.
        joint: group → accuracy where the task of a row is not known.
        intervals: task or group → 95 % interval of the raw score, where they were asked for.
        own: they are the own adapters' themselves, whose shares are 1 by definition.
        log_likelihood: task → natural logarithm of the right answer's probability, the mean of the rows; of the tasks
            that a language model answers. It tells merges apart where none of them finds an answer.
        tokens: task → tokens of an answer on average, where the score itself is that logarithm.
    """

    raw: Mapping[str, float]
    normalised: Mapping[str, float]
    joint: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    own: bool = False
    log_likelihood: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Average of the normalised scores; NaN where no task has an adapter of its own."""
        return _mean(self.normalised.values())

    @property
    def mean_raw(self) -> float:
        """Average of the raw scores."""
        return _mean(self.raw.values())

    @property
    def worst(self) -> str | None:
        """The task with the lowest normalised score."""
        return min(self.normalised, key=lambda task: self.normalised[task], default=None)

    @property
    def margin(self) -> float:
        """Half the 95 % interval of :attr:`mean`; the own adapters' scores count as exact.

        NaN without intervals, and for the own adapters' themselves: that mean is no measurement.
        """
        if self.own:
            return math.nan
        halves = [self._half(task) * self.normalised[task] for task in self._measured]
        return math.hypot(*halves) / len(halves) if halves else math.nan

    def _half(self, task: str) -> float:
        """Half an interval's width, as a share of the score; of log-likelihoods, of the perplexity."""
        (low, high), size = self.intervals[task], self.tokens.get(task, abs(self.raw[task]))
        return (high - low) / 2 / size if size else 0.0

    @property
    def _measured(self) -> list[str]:
        return [task for task in self.normalised if task in self.intervals]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "mean": _finite(self.mean),
            "mean_raw": self.mean_raw,
            "margin": _finite(self.margin),
            "worst": self.worst,
            "raw": dict(self.raw),
            "normalised": dict(self.normalised),
            "joint": dict(self.joint),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "log_likelihood": dict(self.log_likelihood),
        }


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class _Measured:
    """Scores that are not yet set against the own adapters'."""

    tasks: Mapping[str, Scored]
    joint: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def only(self, tasks: Sequence[str]) -> _Measured:
        """Without the other tasks."""
        kept = {name: one for name, one in self.tasks.items() if name in tasks}
        return _Measured(kept, self.joint, {name: self.intervals[name] for name in kept if name in self.intervals})


SCORERS: Mapping[str, type[Scorer]] = {
    "classification": HeadScorer,
    "regression": HeadScorer,
    "generation": GenerationScorer,
    "choice": ChoiceScorer,
    "lm-eval": HarnessScorer,
}
"""Kind of task → what scores it."""


class Evaluator:
    """Scores updates on one split after another; the base is loaded and each split prepared once.

    Args:
        taskset: the tasks.
        adapters: task name → its own adapter, of the tasks that have one.
        limits: rows of each split and task that are used, the first ones; all by default.
        base: instead of the task set's: a folder or a hub id.
        device: of the base model.
    """

    def __init__(
        self,
        taskset: TaskSet,
        adapters: Mapping[str, Updates],
        limits: Mapping[Split, int] | None = None,
        *,
        base: str | Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.taskset = taskset
        self.adapters = adapters
        self._scorers = _scorers(taskset, limits or {})
        self._device = device
        self.encoder = self._load(base)
        self._own: Callable[[Split], _Measured] = cache(self._score_own)

    def _load(self, base: str | Path | None) -> Encoder:
        language = any(scorer.language for scorer in self._scorers)
        return Encoder(self.taskset, base, device=self._device, language=language)

    def score(self, updates: Updates, split: Split, scale: float = 1.0, *, intervals: bool = False) -> Scores:
        """Scores of one update on every task."""
        with self.encoder.carrying(updates, scale):
            found = self._measure(split, intervals)
        return self._against_own(found, split)

    def score_model(self, model: str | Path, split: Split, *, intervals: bool = False) -> Scores:
        """Scores of another model of the base's kind, such as one that updates were merged into."""
        with self._instead(model):
            found = self._measure(split, intervals)
        return self._against_own(found, split)

    def only(self, tasks: Sequence[str]) -> Evaluator:
        """For these tasks alone: base, rows and the own adapters' scores are this one's.

        Raises:
            ConfigError: there is no such task.
        """
        part = copy(self)
        part.taskset = self.taskset.only(tasks)
        part.adapters = {name: adapter for name, adapter in self.adapters.items() if name in tasks}
        part._own = lambda split: self._own(split).only(tasks)
        return part

    def own(self, split: Split) -> Scores:
        """Scores of each task's own adapter on its task."""
        return replace(self._against_own(self._own(split), split), own=True)

    def embeddings(self, updates: Updates, split: Split, scale: float = 1.0) -> dict[str, Tensor]:
        """What the encoder makes of each task's rows, before any head: (rows, width), or a row's patches on their own.

        Of tasks with a head.
        """
        found: dict[str, Tensor] = {}
        with self.encoder.carrying(updates, scale):
            for scorer, names in self._with_heads():
                found |= scorer.embeddings(self.encoder, names, split)
        return found

    def count(self, task: str, split: Split) -> int | None:
        """Rows of a task that are scored; None where the harness counts."""
        scorer = next(scorer for scorer, names in self._scorers.items() if task in names)
        return scorer.count(self.encoder, task, split)

    @property
    def heads(self) -> dict[str, Head]:
        """Task → its head, of the tasks that have one."""
        return {name: scorer.heads[name] for scorer, names in self._with_heads() for name in names}

    def classifiers(self) -> dict[str, Classifier]:
        """Task of classification → the backbone's output and its batch to logits (rows, ..., classes).

        For ``learn_weights(..., objective="entropy", heads=evaluator.classifiers())``.
        """
        found: dict[str, Classifier] = {}
        for scorer, names in self._with_heads():
            found |= scorer.classifiers(self.encoder, names)
        return found

    def _with_heads(self) -> Iterator[tuple[HeadScorer, list[str]]]:
        """What scores heads, and which tasks."""
        for scorer, names in self._scorers.items():
            if isinstance(scorer, HeadScorer):
                yield scorer, [name for name in names if name in self.taskset.tasks]

    @contextmanager
    def _instead(self, model: str | Path) -> Iterator[None]:
        own, self.encoder = self.encoder, self._load(model)
        try:
            yield
        finally:
            self.encoder = own

    def _measure(self, split: Split, intervals: bool) -> _Measured:
        """Every task and group, under the weights of the moment."""
        tasks, groups = self.taskset.tasks, self.taskset.joint
        found = self._scores(tasks, split, groups, intervals)
        between = {name: one.interval for name, one in found.items() if one.interval is not None}
        return _Measured(
            {name: found[name] for name in tasks},
            {group: found[group].value for group in groups},
            between if intervals else {},
        )

    def _scores(self, names: Iterable[str], split: Split, groups: Groups, intervals: bool) -> dict[str, Scored]:
        """Of tasks and groups, whose tasks are of one kind."""
        wanted = set(names)
        found: dict[str, Scored] = {}
        for scorer, known in self._scorers.items():
            own = {group: members for group, members in groups.items() if set(members) <= set(known)}
            asked = [name for name in known if name in wanted]
            if asked:
                found |= scorer.score(self.encoder, asked, split, groups=own, intervals=intervals)
        return found

    def _against_own(self, found: _Measured, split: Split) -> Scores:
        """Not under weights of the moment: the own adapters are scored, too."""
        own = self._own(split).tasks
        normalised = {}
        for name, one in own.items():
            higher = self.taskset.tasks[name].higher_is_better
            normalised[name] = found.tasks[name].share(one.value, higher_is_better=higher)
        return Scores(
            {name: one.value for name, one in found.tasks.items()},
            normalised,
            found.joint,
            found.intervals,
            log_likelihood={n: one.log_likelihood for n, one in found.tasks.items() if one.log_likelihood is not None},
            tokens={n: one.tokens for n, one in found.tasks.items() if one.tokens is not None},
        )

    def _score_own(self, split: Split) -> _Measured:
        scores, between = {}, {}
        for name in self.taskset.tasks:
            if name in self.adapters:
                with self.encoder.carrying(self.adapters[name]):
                    found = self._scores([name], split, {}, True)[name]
                scores[name], between[name] = found, found.interval or (math.nan, math.nan)
        return _Measured(scores, intervals=between)


def _scorers(taskset: TaskSet, limits: Mapping[Split, int]) -> dict[Scorer, list[str]]:
    """One for the kinds that it scores → their tasks."""
    names: dict[type[Scorer], list[str]] = {}
    for name, task in taskset.tasks.items():
        names.setdefault(SCORERS[task.kind], []).append(name)
    return {kind(taskset, known, limits): known for kind, known in names.items()}
