"""Task sets (a base encoder, adapters with heads, labelled rows) and scores of updates on them."""

from __future__ import annotations

from coremerge.evaluation.scoring import Evaluator, Scores
from coremerge.evaluation.taskset import Task, TaskSet, read_taskset

__all__ = ["Evaluator", "Scores", "Task", "TaskSet", "read_taskset"]
