"""What the accuracy benchmarks share: a task set, its rows, and merges that are scored on it."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coremerge import Adapter, Recipe, load, merge
from coremerge.errors import CoremergeError
from coremerge.evaluation import Evaluator, Scores, TaskSet, read_taskset
from coremerge.evaluation.taskset import Split, Task
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm-wordnet"
ROWS: dict[Split, int] = {"validation": 200, "test": 400}
"""Of each task, the first ones."""
SHORT: dict[Split, int] = {"validation": 50, "test": 100}
QUICK: dict[Split, int] = {"validation": 6, "test": 6}


@dataclass(frozen=True)
class Bench:
    """A task set, loaded once.

    Attributes:
        taskset: nothing is known of it but what its file says.
        adapters: task → its own adapter, in memory.
        rows: of each split and task that are used.
    """

    taskset: TaskSet
    adapters: Mapping[str, Adapter]
    rows: Mapping[Split, int]

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.taskset, self.adapters, self.rows)

    def only(self, tasks: Sequence[str]) -> Bench:
        """These tasks and their adapters."""
        part = Bench(self.taskset.only(tasks), {name: self.adapters[name] for name in tasks}, self.rows)
        vars(part)["evaluator"] = self.evaluator.only(tasks)  # the base is loaded once
        return part

    @property
    def base_norms(self) -> dict[str, float]:
        """Adapted module → squared Frobenius norm of its weight in the base, in memory already."""
        known = dict(self.evaluator.encoder.model.named_parameters())
        found = {}
        for module in {name for adapter in self.adapters.values() for name in adapter}:
            (own,) = (p for name, p in known.items() if f".{name}".endswith(f".{module}.weight"))
            found[module] = float(own.detach().double().square().sum())
        return found

    def merged(self, recipe: Recipe) -> Merged:
        """All adapters, merged."""
        result = merge(self.adapters, recipe, base_norms=self.base_norms if recipe.scale == "base" else None)
        return Merged(result, dict(result.adapter))

    def score(self, merged: Merged, split: Split = "test", scale: float | None = None, **settings: Any) -> Scores:
        """At ``scale``, or at the merge's own."""
        factor = 1.0 if scale is None else scale / merged.result.report.scale
        return self.evaluator.score(merged.updates, split, factor, **settings)


@dataclass(frozen=True)
class Merged:
    """A merge, with its updates in memory."""

    result: MergeResult
    updates: Mapping[str, LowRank]


def open_bench(folder: Path = EXAMPLE, rows: Mapping[Split, int] = ROWS) -> Bench:
    """A task set whose tasks have adapters of their own."""
    taskset = read_taskset(folder)
    return Bench(taskset, {name: load(path).load() for name, path in taskset.own().items()}, rows)


def bench_of(parser: ArgumentParser, folder: Path, rows: Mapping[Split, int]) -> Bench:
    """:func:`open_bench` of what a person named; what it refuses is the command's own error."""
    try:
        return open_bench(folder, rows)
    except CoremergeError as error:
        parser.error(str(error))


def kind_of(task: Task) -> str:
    """``classification``, ``regression``, ``dense`` (a label a patch or a pixel), ``generation`` or ``choice``."""
    return task.kind if task.per == "input" else "dense"


def worst(scores: Scores) -> str:
    """The lowest normalised score, and whose it is."""
    return f"{scores.normalised[scores.worst]:.3f} ({scores.worst})" if scores.worst else ""


def spread(values: Sequence[float]) -> str:
    """Their mean, and their standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
