"""Task sets (a base model, adapters with heads, labelled rows) and scores of updates on them."""

from __future__ import annotations

from coremerge.evaluation.evaluate import Evaluation, evaluate
from coremerge.evaluation.scoring import Evaluator, Scores
from coremerge.evaluation.taskset import Task, TaskSet, read_taskset

__all__ = ["Evaluation", "Evaluator", "Scores", "Task", "TaskSet", "evaluate", "read_taskset"]
