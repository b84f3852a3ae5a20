"""Any adapters, or models that they were merged into, scored on any task set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError
from coremerge.evaluation.scoring import Evaluator, Scores
from coremerge.evaluation.taskset import Split, Task, TaskSet, read_taskset
from coremerge.formats import load
from coremerge.formats.source import local_path
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
    progress: Progress | None = None,
) -> Evaluation:
    """Score ``sources`` on every task, beside no adapter and each task's own.

    Args:
        sources: adapters (folders, files or hub ids), or folders of whole models.
        tasks: a task set: see :func:`~coremerge.evaluation.read_taskset`.
        base: the base model, if it is not the task set's: a folder or a hub id.
        split: ``"test"`` or ``"validation"``.
        limit: rows of each task, the first ones; all by default.
        only: tasks, if not all.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        allow_pickle: read legacy ``.bin`` files.
        progress: called between the parts.

    Raises:
        CoremergeError: a refusal that says what to do.
    """
    if limit is not None and limit < 1:
        raise ConfigError("at least 1 is needed", key="limit", value=limit)
    taskset = tasks if isinstance(tasks, TaskSet) else read_taskset(tasks)
    taskset = taskset if only is None else taskset.only(only)
    known = [source for source in sources if not is_model(source)]
    given = read_adapters(known, base=base, allow_pickle=allow_pickle) if known else {}
    own = {name: load(path) for name, path in taskset.own().items()}
    if not given and not own and len(known) == len(sources):
        raise InputError("nothing to evaluate", remedy="Name an adapter, or a model that was merged")
    evaluator = Evaluator(taskset, own, {split: limit} if limit else None, base=base, device=device)
    labels = dict(zip(map(str, known), given, strict=True))
    count = len(sources) + 1 + bool(own)

    def rows() -> Iterator[Evaluated]:
        if own:
            yield Evaluated(OWN, evaluator.own(split))
        yield Evaluated(NONE, evaluator.score({}, split, intervals=True))
        for source in map(str, sources):
            if source in labels:
                yield _row(evaluator, labels[source], given[labels[source]], source, split)
            else:
                yield Evaluated(Path(source).name, evaluator.score_model(source, split, intervals=True), source)

    found: list[Evaluated] = []
    for row in rows():
        found.append(row)
        if progress:
            progress("scoring", len(found), count)
    counts = {name: evaluator.count(name, split) for name in taskset.tasks}
    return Evaluation(taskset.name, split, evaluator.encoder.base, taskset.tasks, counts, tuple(found))


def _row(evaluator: Evaluator, label: str, adapter: Adapter, source: str, split: Split) -> Evaluated:
    left_out = evaluator.encoder.left_out(adapter)
    notes = [f"{name} has no place in the base model and does not count" for name in left_out]
    return Evaluated(label, evaluator.score(adapter, split, intervals=True), source, tuple(notes))


def is_model(source: str | Path) -> bool:
    """Whether it is a folder of a whole model, not of an adapter."""
    path = local_path(source)
    return path is not None and (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
