"""A task's inputs without their labels: what merges are learned from or fitted to."""

from __future__ import annotations

from coremerge.evaluation.prompts import read_questions
from coremerge.evaluation.taskset import ANSWERED, TaskSet
from coremerge.learning.examples import read_examples
from coremerge.learning.rows import Example

MOST = 10_000
"""Inputs of a task: a fit is given some dozens."""


def read_unlabelled(taskset: TaskSet, name: str) -> list[Example]:
    """The inputs of a task: of the file that it names for that, or else of its validation rows.

    Args:
        taskset: the tasks.
        name: one of them, of any kind but the harness's.

    Raises:
        SourceError: the file is missing.
        ConfigError: a line is no input, or the task has neither.
    """
    task = taskset.tasks[name]
    if task.unlabelled is not None:
        return read_examples(taskset.path(task.unlabelled), count=MOST)
    if task.kind in ANSWERED:
        return [question.prompt for question in read_questions(taskset, name, "validation")]
    return [row.example for row in taskset.rows(name, "validation")]
