"""The main job on a task set: merge its adapters in several ways, fit them, and score what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge.recipe import Recipe

if TYPE_CHECKING:
    from coremerge.adapter import Adapter
    from coremerge.evaluation import Evaluator, Scores
    from coremerge.evaluation.scales import Scales
    from coremerge.evaluation.taskset import Split
    from coremerge.lowrank import LowRank
    from coremerge.merging import MergeResult

CANDIDATES: Mapping[str, Recipe] = {
    "task arithmetic": Recipe(method="sum", steps=[], rank="exact"),
    "TIES, full space": Recipe(space="full", method="ties", steps=[], rank="exact"),
    "KnOTS-TIES": Recipe(space="knots", method="ties", steps=[], rank="exact"),
    "core TIES": Recipe(method="ties", steps=[], rank="exact"),
    "core TSV": Recipe(method="tsv", steps=[], rank="exact"),
    "core Iso-C": Recipe(method="sum", steps=["isotropize"], rank="exact"),
    "core TSV + Iso-C": Recipe(method="tsv", steps=["isotropize"], rank="exact"),
    "coremerge's default": Recipe(),
}
"""Each way to merge, as published, and what this package does when it is not told how."""

ROWS: Mapping[Split, int] = {"validation": 50, "test": 100}
"""Rows of each task that a quick run uses."""

INPUTS = 16
"""Of each task, without their labels, for the fit."""

FITTED = f"coremerge fit, {INPUTS} inputs a task"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the parts done and their number."""


@dataclass(frozen=True)
class Row:
    """One way to merge.

    Attributes:
        label: its name.
        scores: on the test split, at the default scale.
        scale: the default scale, where there is one.
        seconds: what the merge took, reading the adapters included.
        tuned_scale: the scale that was best on the validation split.
        tuned: scores on the test split at that scale.
    """

    label: str
    scores: Scores
    scale: float | None = None
    seconds: float | None = None
    tuned_scale: float | None = None
    tuned: Scores | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "label": self.label,
            "seconds": self.seconds,
            "scale": self.scale,
            "scores": self.scores.to_dict(),
            "tuned_scale": self.tuned_scale,
            "tuned": self.tuned.to_dict() if self.tuned else None,
        }


@dataclass(frozen=True)
class DemoResult:
    """The table.

    Attributes:
        name: of the task set.
        rows: each task's own adapter, no adapter, the merges, and what is fitted to a few inputs.
        seconds: spent in all.
        used: split → rows of each task; None where all of them were.
        left_out: tasks of the set that were not looked at.
    """

    name: str
    rows: tuple[Row, ...]
    seconds: float
    used: Mapping[Split, int] | None
    left_out: int = 0

    @property
    def full(self) -> bool:
        """All rows of the splits were used."""
        return self.used is None

    def __getitem__(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "full": self.full,
            "rows": [row.to_dict() for row in self.rows],
        }


def run_demo(
    folder: str | Path,
    *,
    full: bool = False,
    candidates: Mapping[str, Recipe] = CANDIDATES,
    rows: Mapping[Split, int] = ROWS,
    tasks: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Merge the adapters of a task set in several ways and score every merge on every task.

    Args:
        folder: of the task set: see :func:`coremerge.evaluation.read_taskset`.
        full: use every row and a finer grid of scales.
        candidates: label → recipe.
        rows: split → rows of each task that are used otherwise, the first ones; without any for validation, no scale
            is tuned.
        tasks: that are looked at then; by default all.
        threads: of the merges.
        progress: called between the parts.

    Raises:
        CoremergeError: a file of the task set is missing or wrong, or an extra is not installed.
    """
    from coremerge.evaluation import Evaluator, read_taskset
    from coremerge.evaluation.scales import Scales
    from coremerge.formats import load
    from coremerge.merging import merge

    start = time.perf_counter()
    whole = read_taskset(folder)
    taskset = whole.only(tasks) if tasks and not full else whole
    adapters = {name: load(path) for name, path in taskset.own().items()}
    used = None if full else rows
    evaluator = Evaluator(taskset, adapters, used)
    tuning = Scales(start=1, factor=2**0.25, patience=2) if full else Scales(start=1) if "validation" in rows else None
    labels = ("own adapter", "no adapter", *candidates, FITTED)

    def tell(done: int) -> None:
        if progress:
            progress(labels[done] if done < len(labels) else "done", done, len(labels))

    tell(0)
    found = [Row(labels[0], evaluator.own("test"))]
    tell(1)
    found.append(Row(labels[1], evaluator.score({}, "test")))
    for label, recipe in candidates.items():
        tell(len(found))
        found.append(_measure(label, partial(merge, adapters, recipe, threads=threads), evaluator, tuning))
    tell(len(found))
    found.append(_fit(adapters, evaluator))
    tell(len(found))
    seconds = time.perf_counter() - start
    return DemoResult(taskset.name, tuple(found), seconds, used, len(whole.tasks) - len(taskset.tasks))


def _fit(adapters: Mapping[str, Adapter], evaluator: Evaluator) -> Row:
    """Fitted to inputs that no scale is tuned on, where there are enough; nothing of it is tuned."""
    from coremerge.evaluation.unlabelled import read_unlabelled
    from coremerge.learning import answered_batches, fit
    from coremerge.learning.own_answers import answering

    start = time.perf_counter()
    encoder, taskset = evaluator.encoder, evaluator.taskset
    inputs = {name: read_unlabelled(taskset, name)[-INPUTS:] for name in adapters}
    answered = bool(answering(adapters, inputs))
    if answered:
        data = answered_batches(encoder.model, adapters, inputs, encoder.processor, size=INPUTS)
    else:
        data = {name: [batch for _, batch in encoder.placed(examples, INPUTS)] for name, examples in inputs.items()}
    updates = dict(fit(encoder.model, adapters, data, answered=answered).adapter)
    seconds = time.perf_counter() - start
    return Row(FITTED, evaluator.score(updates, "test"), seconds=seconds)


def _measure(label: str, run: Callable[[], MergeResult], evaluator: Evaluator, tuning: Scales | None) -> Row:
    """One merge, scored as it comes and with its scale tuned: a merged update is linear in its scale."""
    from coremerge.evaluation.scales import walk

    start = time.perf_counter()
    merged = run()
    updates: dict[str, LowRank] = dict(merged.adapter)
    seconds = time.perf_counter() - start
    row = Row(label, evaluator.score(updates, "test"), merged.report.scale, seconds)
    if tuning is None:
        return row
    factor, _ = walk(lambda f: evaluator.score(updates, "validation", f).mean, tuning)
    tuned = row.scores if factor == 1 else evaluator.score(updates, "test", factor)
    return replace(row, tuned_scale=merged.report.scale * factor, tuned=tuned)
