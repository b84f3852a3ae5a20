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
    from coremerge.errors import ConfigError
    from coremerge.inputs import by_label
    from coremerge.learning.weights import check_names

    labels = list(labels)
    found: dict[str, str | list[Example]] = {}
    for text in filter(_is_taskset, given):
        for label, examples in _of_all(text, labels):
            if label in found:
                raise ConfigError("two task sets have this task", key="data", value=label, remedy="Give it from one")
            found[label] = examples
    named = by_label(pairs_of(given, [*labels, *adapters]), labels, adapters)
    check_names("data", named, labels)
    return found | {label: _of_one(source, label) if _is_taskset(source) else source for label, source in named.items()}


def pairs_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """What is ``name=path``; the rest are task sets.

    Raises:
        BadParameter: neither of both.
    """
    from coremerge.cli import _options

    return _options.initial(
        [text for text in given if not _is_taskset(text)], names, "--data", "NAME=PATH, nor a task set"
    )


def _is_taskset(source: str) -> bool:
    """Whether it is a folder with tasks.yaml, or that file."""
    from coremerge.evaluation.taskset import FILE

    try:
        path = Path(source).expanduser()
        return (path.is_file() and path.name == FILE) or (path / FILE).is_file()
    except (OSError, RuntimeError):  # a name that no file can have, a home that nobody has
        return False


def _of_all(source: str, labels: Sequence[str]) -> Iterator[tuple[str, list[Example]]]:
    from coremerge.errors import ConfigError
    from coremerge.evaluation.taskset import HARNESS, read_taskset

    taskset = read_taskset(Path(source).expanduser())
    tasks = [label for label in labels if label in taskset.tasks and taskset.tasks[label].kind != HARNESS]
    if not tasks:
        raise ConfigError(
            "no task is named like an adapter", file=source, key="tasks", value=", ".join(taskset.tasks),
            remedy=f"Adapters: {', '.join(labels)}; give the files of their inputs, NAME=FILE",
        )  # fmt: skip
    for label in tasks:
        yield label, _inputs(taskset, label)


def _of_one(source: str, label: str) -> list[Example]:
    from coremerge.evaluation.taskset import read_taskset

    return _inputs(read_taskset(Path(source).expanduser()), label)


def _inputs(taskset: TaskSet, name: str) -> list[Example]:
    from coremerge.errors import ConfigError
    from coremerge.evaluation.taskset import HARNESS
    from coremerge.evaluation.unlabelled import read_unlabelled

    if name not in taskset.tasks or taskset.tasks[name].kind == HARNESS:
        what = (
            "no task of that name" if name not in taskset.tasks else "a task of the harness, which has no inputs here"
        )
        remedy = f"Tasks: {', '.join(taskset.tasks)}; or give the file of its inputs, {name}=FILE"
        raise ConfigError(what, file=taskset.folder, value=name, remedy=remedy)
    return read_unlabelled(taskset, name)
