"""Scores of updates on a task set: raw, and relative to each task's own adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coremerge.errors import SourceError, TensorError
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.metrics import METRICS
from coremerge.evaluation.taskset import Split, TaskSet
from coremerge.lowrank import LowRank

Updates = Mapping[str, LowRank]


@dataclass(frozen=True)
class Scores:
    """One update's scores.

    Attributes:
        raw: task → the task's metric.
        normalised: task → raw over that of the task's own adapter.
    """

    raw: Mapping[str, float]
    normalised: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Average of the normalised scores."""
        return sum(self.normalised.values()) / len(self.normalised)

    @property
    def mean_raw(self) -> float:
        """Average of the raw scores."""
        return sum(self.raw.values()) / len(self.raw)

    @property
    def worst(self) -> str:
        """The task with the lowest normalised score."""
        return min(self.normalised, key=lambda task: self.normalised[task])

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "mean": self.mean,
            "mean_raw": self.mean_raw,
            "worst": self.worst,
            "raw": dict(self.raw),
            "normalised": dict(self.normalised),
        }


class Evaluator:
    """Scores updates on one split after another; the base is loaded and each split tokenised once.

    Args:
        taskset: the tasks.
        adapters: task name → its own adapter.
        limits: rows of each split and task that are used, the first ones; all by default.
    """

    def __init__(
        self, taskset: TaskSet, adapters: Mapping[str, Updates], limits: Mapping[Split, int] | None = None
    ) -> None:
        self.taskset = taskset
        self.encoder = Encoder(taskset)
        self.adapters = adapters
        self.heads = {name: _load_head(taskset, name) for name in taskset.tasks}
        self._limits = limits or {}
        self._prepared = cache(self._prepare)
        self._own = cache(self._score_own)

    def score(self, updates: Updates, split: Split, scale: float = 1.0) -> Scores:
        """Scores of one update on every task."""
        with self.encoder.carrying(updates, scale):
            raw = {name: self._raw(name, split) for name in self.taskset.tasks}
        return self._against_own(raw, split)

    def own(self, split: Split) -> Scores:
        """Scores of each task's own adapter on its task."""
        return self._against_own(self._own(split), split)

    def _against_own(self, raw: Mapping[str, float], split: Split) -> Scores:
        own = self._own(split)
        return Scores(raw, {name: raw[name] / own[name] for name in raw})

    def _score_own(self, split: Split) -> dict[str, float]:
        scores = {}
        for name in self.taskset.tasks:
            with self.encoder.carrying(self.adapters[name]):
                scores[name] = self._raw(name, split)
        return scores

    def _raw(self, name: str, split: Split) -> float:
        """The task's metric under the weights of the moment."""
        batches, labels = self._prepared(name, split)
        weight, bias = self.heads[name]
        return METRICS[self.taskset.tasks[name].metric](self.encoder.features(batches) @ weight.T + bias, labels)

    def _prepare(self, name: str, split: Split) -> tuple[list[tuple[Tensor, dict[str, Tensor]]], Tensor]:
        rows = self.taskset.rows(name, split, self._limits.get(split))
        return self.encoder.tokenize(rows), torch.tensor([row.label for row in rows])


def _load_head(taskset: TaskSet, name: str) -> tuple[Tensor, Tensor]:
    """Weight (outputs, width) and bias (outputs,) in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    task = taskset.tasks[name]
    path = taskset.path(task.head)
    try:
        tensors = load_file(path)
        weight, bias = tensors["weight"].float(), tensors["bias"].float()
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read: {error}", file=path) from None
    except KeyError as error:
        raise TensorError("a head needs weight and bias", file=path, key=str(error.args[0])) from None
    if len(weight) != task.outputs or bias.shape != weight.shape[:1]:
        raise TensorError(
            f"the head has {len(weight)} outputs, the task {task.outputs}",
            file=path,
            remedy=f"Correct the classes of {name} in {taskset.folder}",
        )
    return weight, bias
