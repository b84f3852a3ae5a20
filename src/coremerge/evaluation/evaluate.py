"""Any adapters, or models that they were merged into, scored on any task set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError
from coremerge.evaluation.scoring import Evaluator, Scores
from coremerge.evaluation.taskset import Split, Task, TaskSet, read_taskset
from coremerge.executors import Executor, remembered
from coremerge.formats import load
from coremerge.formats.source import in_full, local_path
from coremerge.inputs import Progress, read_adapters

OWN = "each task's own adapter"
NONE = "no adapter"


@dataclass(frozen=True)
class Evaluated:
    """One row of the table.

    Attributes:
        label: of the adapter or model.
        scores: see :class:`~coremerge.evaluation.Scores`.
        source: as the person gave it; None for the rows that are there for comparison.
        notes: what it carries that did not count.
    """

    label: str
    scores: Scores
    source: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The table.

    Attributes:
        name: of the task set.
        split: that was scored.
        base: the base model.
        tasks: of the task set.
        counts: task → rows that were scored; None where a harness counts.
        rows: each task's own adapter (where tasks have one) and no adapter first.
    """

    name: str
    split: Split
    base: str
    tasks: Mapping[str, Task]
    counts: Mapping[str, int | None]
    rows: tuple[Evaluated, ...]

    def __getitem__(self, label: str) -> Evaluated:
        return next(row for row in self.rows if row.label == label)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "split": self.split,
            "base": self.base,
            "tasks": {
                name: {"kind": task.kind, "metric": task.metric, "rows": self.counts[name]}
                for name, task in self.tasks.items()
            },
            "rows": [
                {"label": row.label, "source": row.source, **row.scores.to_dict(), "notes": list(row.notes)}
                for row in self.rows
            ],
        }


def evaluate(
    sources: Sequence[str | Path],
    tasks: str | Path | TaskSet,
    *,
    base: str | Path | None = None,
    split: Split = "test",
    limit: int | None = None,
    only: Sequence[str] | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score ``sources`` on every task, beside no adapter and each task's own.

    Args:
        sources: adapters (folders, files, URLs or hub ids), or folders of whole models.
        tasks: a task set: see :func:`~coremerge.evaluation.read_taskset`.
        base: the base model, if it is not the task set's: a folder or a hub id.
        split: ``"test"`` or ``"validation"``.
        limit: rows of each task, the first ones; all by default.
        only: tasks, if not all.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        allow_pickle: read legacy ``.bin`` files.
        executor: other processes that score one row each, such as :class:`coremerge.executors.ray.Ray`.
        progress: called between the parts.

    Raises:
        CoremergeError: a refusal that says what to do.
    """
    if limit is not None and limit < 1:
        raise ConfigError("at least 1 is needed", key="limit", value=limit)
    taskset = tasks if isinstance(tasks, TaskSet) else read_taskset(tasks)
    taskset = taskset if only is None else taskset.only(only)
    asked = Asked(
        taskset, tuple(map(str, sources)), None if base is None else str(base), split, limit, device, allow_pickle
    )
    opened = _open(asked)
    wanted = [*([OWN] if opened.own else []), NONE, *asked.sources]
    if executor:
        places = {source: in_full(source) for source in asked.sources}
        rows = executor.run(partial(_score, asked.absolute()), wanted, lambda _: 60.0, lambda one: places.get(one, one))
    else:
        rows = (opened.row(one) for one in wanted)
    found: list[Evaluated] = []
    for row, one in zip(rows, wanted, strict=True):
        found.append(replace(row, source=one if row.source else None))
        if progress:
            progress("scoring", len(found), len(wanted))
    evaluator = opened.evaluator
    counts = {name: evaluator.count(name, split) for name in taskset.tasks}
    return Evaluation(taskset.name, split, evaluator.encoder.base, taskset.tasks, counts, tuple(found))


@dataclass(frozen=True)
class Asked:
    """An evaluation, in a form that can be sent: see :func:`evaluate`."""

    taskset: TaskSet
    sources: tuple[str, ...]
    base: str | None
    split: Split
    limit: int | None
    device: str
    allow_pickle: bool

    def absolute(self) -> Asked:
        """With all paths in full."""
        taskset = self.taskset.model_copy(update={"folder": self.taskset.folder.absolute()})
        sources = tuple(map(in_full, self.sources))
        return replace(self, taskset=taskset, sources=sources, base=self.base and in_full(self.base))


@dataclass(frozen=True)
class _Opened:
    """What it takes to score the rows of an evaluation."""

    evaluator: Evaluator
    own: Mapping[str, Adapter]
    given: Mapping[str, Adapter]
    split: Split

    def row(self, one: str) -> Evaluated:
        """A source's, or one of those beside them."""
        if one == OWN:
            return Evaluated(OWN, self.evaluator.own(self.split))
        if one == NONE:
            return Evaluated(NONE, self.evaluator.score({}, self.split, intervals=True))
        if one in self.given:
            return _row(self.evaluator, self.given[one], one, self.split)
        scores = self.evaluator.score_model(one, self.split, intervals=True)
        return Evaluated(Path(one).name, scores, one)


def _open(asked: Asked) -> _Opened:
    known = [source for source in asked.sources if not is_model(source)]
    given = read_adapters(known, base=asked.base, allow_pickle=asked.allow_pickle) if known else {}
    own = {name: load(path) for name, path in asked.taskset.own().items()}
    if not given and not own and len(known) == len(asked.sources):
        raise InputError("nothing to evaluate", remedy="Name an adapter, or a model that was merged")
    limits: dict[Split, int] | None = {asked.split: asked.limit} if asked.limit else None
    evaluator = Evaluator(asked.taskset, own, limits, base=asked.base, device=asked.device)
    labelled = (adapter.renamed(label) for label, adapter in given.items())
    return _Opened(evaluator, own, dict(zip(known, labelled, strict=True)), asked.split)


_opened = remembered(_open)


def _score(asked: Asked, one: str) -> Evaluated:
    return _opened(asked).row(one)


def _row(evaluator: Evaluator, adapter: Adapter, source: str, split: Split) -> Evaluated:
    left_out = evaluator.encoder.left_out(adapter)
    notes = [f"{name} has no place in the base model and does not count" for name in left_out]
    return Evaluated(adapter.name, evaluator.score(adapter, split, intervals=True), source, tuple(notes))


def is_model(source: str | Path) -> bool:
    """Whether it is a folder of a whole model, not of an adapter."""
    path = local_path(source)
    return path is not None and (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
