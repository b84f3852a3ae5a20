"""The labels of a task's rows as one array, as metrics take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coremerge.errors import ConfigError
from coremerge.evaluation.maps import read_classes, read_values
from coremerge.evaluation.resampling import Values
from coremerge.evaluation.taskset import Row, Task


def labels_of(rows: Sequence[Row], task: Task, name: str) -> Values:
    """(rows,), (rows, patches) or (rows, height, width); with several outputs a last dimension of them.

    Args:
        rows: of the task.
        task: says what a label is.
        name: the task's, for messages.

    Raises:
        ConfigError: rows with different numbers of labels, or maps of different sizes; a map that is none.
        SourceError: a map cannot be read.
    """
    labels = [_map(row, task) for row in rows] if task.per == "pixel" else [np.array(row.label) for row in rows]
    for row, label in zip(rows, labels, strict=True):
        if label.shape != labels[0].shape:
            one, other = (len(labels[0]), len(label)) if task.per == "patch" else (labels[0].shape, label.shape)
            what = "rows with different numbers of patches" if task.per == "patch" else "maps of different sizes"
            raise ConfigError(
                f"{what}: {one} in the first row, {other} here", file=row.example.place, key=f"tasks.{name}",
                remedy="Give all rows of a task labels of one shape",
            )  # fmt: skip
    return np.stack(labels)


def _map(row: Row, task: Task) -> Values:
    path, place = row.label, row.example.place
    if task.classes:
        return read_classes(path, len(task.classes), place)  # type: ignore[arg-type]
    found = read_values(path, task.outputs, place)  # type: ignore[arg-type]
    return found if task.outputs > 1 else found[..., 0]
