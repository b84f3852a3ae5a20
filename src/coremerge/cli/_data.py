"""--data: where the inputs of each adapter's task are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coremerge.evaluation.taskset import TaskSet
    from coremerge.learning.rows import Example

HELP = (
    "Unlabelled inputs of an adapter's task: JSON lines (text, pair, messages, image, audio), a text file, a folder of"
    " images, or a data set, once per adapter; or the folder of a task set whose tasks are named like the adapters."
)
METAVAR = "NAME=PATH|TASKS"


def inputs_of(given: Sequence[str], labels: Iterable[str], adapters: Sequence[str]) -> dict[str, str | list[Example]]:
    """An adapter's label → its inputs, or where they are.

    Args:
        given: ``name=path``; or task sets, of which each task that has an adapter's label brings its inputs, unless it
            is named alone, too.
        labels: of the adapters.
        adapters: their sources, by which they may be named as well.

    Raises:
        BadParameter: neither of both.
        ConfigError: a task set without a task of an adapter.
    """
    from coremerge.cli import _options
    from coremerge.inputs import by_label

    labels = list(labels)
    sets = [text for text in given if _is_taskset(text)]
    found = dict(pair for text in sets for pair in _of_all(text, labels))
    pairs = _options.initial([text for text in given if text not in sets], [*labels, *adapters], "--data")
    named = by_label(pairs, labels, adapters)
    return found | {label: _of_one(source, label) if _is_taskset(source) else source for label, source in named.items()}


def _is_taskset(source: str) -> bool:
    """Whether it is a folder with tasks.yaml, or that file."""
    from coremerge.evaluation.taskset import FILE

    path = Path(source)
    try:
        return (path.is_file() and path.name == FILE) or (path / FILE).is_file()
    except OSError:  # a name that no file can have
        return False


def _of_all(source: str, labels: Sequence[str]) -> Iterator[tuple[str, list[Example]]]:
    from coremerge.errors import ConfigError
    from coremerge.evaluation.taskset import HARNESS, read_taskset

    taskset = read_taskset(source)
    tasks = [label for label in labels if label in taskset.tasks and taskset.tasks[label].kind != HARNESS]
    if not tasks:
        raise ConfigError(
            "no task is named like an adapter", file=source, key="tasks", value=", ".join(taskset.tasks),
            remedy=f"Adapters: {', '.join(labels)}; rename them, or give NAME=PATH",
        )  # fmt: skip
    for label in tasks:
        yield label, _inputs(taskset, label)


def _of_one(source: str, label: str) -> list[Example]:
    from coremerge.evaluation.taskset import read_taskset

    return _inputs(read_taskset(source), label)


def _inputs(taskset: TaskSet, name: str) -> list[Example]:
    from coremerge.errors import ConfigError
    from coremerge.evaluation.unlabelled import read_unlabelled

    if name not in taskset.tasks:
        raise ConfigError(
            "no task of that name", file=taskset.folder, value=name, remedy=f"Tasks: {', '.join(taskset.tasks)}"
        )
    return read_unlabelled(taskset, name)
