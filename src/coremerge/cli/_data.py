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
    " images, or a data set, once per adapter; or the folder of a task set whose tasks are named like the adapters; or,"
    " without a name, inputs that nobody has sorted: they serve every adapter that has none of its own."
)
METAVAR = "NAME=PATH|TASKS|POOL"


def inputs_of(given: Sequence[str], labels: Iterable[str], adapters: Sequence[str]) -> dict[str, str | list[Example]]:
    """An adapter's label → its inputs, or where they are.

    Args:
        given: ``name=path``; or task sets, of which each task that has an adapter's label brings its inputs, unless it
            is named alone, too; or one path without a name, whose inputs go to all adapters that have no others.
        labels: of the adapters.
        adapters: their sources, by which they may be named as well.

    Raises:
        BadParameter: neither of both.
        ConfigError: a task set without a task of an adapter, or a path without a name that serves none.
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
    found |= {label: _of_one(source, label) if _is_taskset(source) else source for label, source in named.items()}
    pool = _pool(given)
    if pool is not None and not set(labels) - set(found):
        remedy = "Leave it out, or say whose it is: NAME=PATH"
        raise ConfigError("every adapter has inputs of its own", key="data", value=pool, remedy=remedy)
    return found if pool is None else {label: found.get(label, pool) for label in labels}


def _pool(given: Sequence[str]) -> str | None:
    """The one that has no name.

    Raises:
        ConfigError: there are two.
    """
    from coremerge.errors import ConfigError

    pools = [text for text in given if _is_pool(text)]
    if len(pools) > 1:
        raise ConfigError(
            "two sources without a name", key="data", value=", ".join(pools),
            remedy="Put their inputs into one, or say whose they are: NAME=PATH",
        )  # fmt: skip
    return pools[0] if pools else None


def pairs_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """What is ``name=path``; the rest are task sets and a pool.

    Raises:
        BadParameter: a name or a path is empty.
    """
    from coremerge.cli import _options

    pairs = [text for text in given if not _is_taskset(text) and not _is_pool(text)]
    return _options.initial(pairs, names, "--data", "NAME=PATH, nor a task set")


def _is_pool(text: str) -> bool:
    """Whether it has no name in front; a file's own name may have an = in it."""
    if not text or _is_taskset(text):
        return False
    try:
        return "=" not in text or Path(text).expanduser().exists()
    except (OSError, RuntimeError):
        return False


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
