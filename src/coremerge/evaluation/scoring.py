"""Scores of updates on a task set: raw, relative to each task's own adapter, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coremerge.errors import ConfigError, TensorError
from coremerge.evaluation import harness
from coremerge.evaluation.encoder import Encoder, Placed
from coremerge.evaluation.metrics import METRICS, Interval, Metric, Values, find_metric
from coremerge.evaluation.taskset import FILE, HARNESS, Row, Split, TaskSet
from coremerge.formats.safetensors_file import SafetensorsFile
from coremerge.lowrank import LowRank

Updates = Mapping[str, LowRank]


@dataclass(frozen=True)
class Scores:
    """One update's scores.

    Attributes:
        raw: task → the task's metric.
        normalised: task → raw over that of the task's own adapter (the other way round for errors), of the tasks that
            have one.
        joint: group → accuracy where the task of a row is not known.
        intervals: task or group → 95 % interval of the raw score, where they were asked for.
        own: they are the own adapters' themselves, whose shares are 1 by definition.
    """

    raw: Mapping[str, float]
    normalised: Mapping[str, float]
    joint: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    own: bool = False

    @property
    def mean(self) -> float:
        """Average of the normalised scores; NaN where no task has an adapter of its own."""
        return _mean(self.normalised.values())

    @property
    def mean_raw(self) -> float:
        """Average of the raw scores."""
        return _mean(self.raw.values())

    @property
    def worst(self) -> str | None:
        """The task with the lowest normalised score."""
        return min(self.normalised, key=lambda task: self.normalised[task], default=None)

    @property
    def margin(self) -> float:
        """Half the 95 % interval of :attr:`mean`; the own adapters' scores count as exact.

        NaN without intervals, and for the own adapters' themselves: that mean is no measurement.
        """
        if self.own:
            return math.nan
        halves = [_half(self.intervals[task], self.raw[task]) * self.normalised[task] for task in self._measured]
        return math.hypot(*halves) / len(halves) if halves else math.nan

    @property
    def _measured(self) -> list[str]:
        return [task for task in self.normalised if task in self.intervals]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "mean": _finite(self.mean),
            "mean_raw": self.mean_raw,
            "margin": _finite(self.margin),
            "worst": self.worst,
            "raw": dict(self.raw),
            "normalised": dict(self.normalised),
            "joint": dict(self.joint),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
        }


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def _half(interval: Interval, score: float) -> float:
    """Half an interval's width, as a share of the score."""
    return (interval[1] - interval[0]) / 2 / abs(score) if score else 0.0


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class _Measured:
    """Scores that are not yet set against the own adapters'."""

    raw: Mapping[str, float]
    joint: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)


def _scored(found: tuple[Metric, Values, Values]) -> float:
    metric, predictions, labels = found
    return metric.score(predictions, labels)


class Evaluator:
    """Scores updates on one split after another; the base is loaded and each split tokenised once.

    Args:
        taskset: the tasks.
        adapters: task name → its own adapter, of the tasks that have one.
        limits: rows of each split and task that are used, the first ones; all by default.
        base: instead of the task set's: a folder or a hub id.
        device: of the base model.
    """

    def __init__(
        self,
        taskset: TaskSet,
        adapters: Mapping[str, Updates],
        limits: Mapping[Split, int] | None = None,
        *,
        base: str | Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.taskset = taskset
        self.adapters = adapters
        self.heads = {name: _load_head(taskset, name) for name, task in taskset.tasks.items() if task.kind != HARNESS}
        self._metrics = {name: metric for name in self.heads if (metric := find_metric(taskset.tasks[name].metric))}
        self._left = [name for name, task in taskset.tasks.items() if task.kind == HARNESS]
        self._device = device
        self.encoder = self._load(base)
        self._limits = limits or {}
        self._prepared = cache(self._prepare)
        self._own = cache(self._score_own)

    def _load(self, base: str | Path | None) -> Encoder:
        return Encoder(self.taskset, base, device=self._device, language=bool(self._left))

    def score(self, updates: Updates, split: Split, scale: float = 1.0, *, intervals: bool = False) -> Scores:
        """Scores of one update on every task."""
        with self.encoder.carrying(updates, scale):
            found = self._measure(split, intervals)
        return self._against_own(found, split)

    def score_model(self, model: str | Path, split: Split, *, intervals: bool = False) -> Scores:
        """Scores of another model of the base's kind, such as one that updates were merged into."""
        with self._instead(model):
            found = self._measure(split, intervals)
        return self._against_own(found, split)

    def own(self, split: Split) -> Scores:
        """Scores of each task's own adapter on its task."""
        return replace(self._against_own(self._own(split), split), own=True)

    def embeddings(self, updates: Updates, split: Split, scale: float = 1.0) -> dict[str, Tensor]:
        """What the encoder makes of each task's rows, before any head: (rows, width), or a row's patches on their own.

        Tasks of the harness are left out.
        """
        with self.encoder.carrying(updates, scale):
            return {name: self._features(name, split) for name in self.heads}

    def count(self, task: str, split: Split) -> int | None:
        """Rows of a task that are scored; None where the harness counts."""
        return None if task in self._left else len(self._prepared(task, split)[1])

    @contextmanager
    def _instead(self, model: str | Path) -> Iterator[None]:
        own, self.encoder = self.encoder, self._load(model)
        try:
            yield
        finally:
            self.encoder = own

    def _measure(self, split: Split, intervals: bool) -> _Measured:
        """Every task and group, under the weights of the moment."""
        tasks = self.taskset.tasks
        features = {name: self._features(name, split) for name in self.heads}
        found = {
            name: (self._metrics[name], self._predicted(name, features[name]), self._labels(name, split))
            for name in self.heads
        }
        joined = {
            group: (METRICS["accuracy"], *self._joined(names, features, split))
            for group, names in self.taskset.joint.items()
        }
        left = self._by_harness(self._left, split)
        raw = {name: left[name][0] if name in left else _scored(found[name]) for name in tasks}
        joint = {group: _scored(values) for group, values in joined.items()}
        if not intervals:
            return _Measured(raw, joint)
        between = {name: metric.between(*values) for name, (metric, *values) in (found | joined).items()}
        return _Measured(raw, joint, between | {name: interval for name, (_, interval) in left.items()})

    def _against_own(self, found: _Measured, split: Split) -> Scores:
        """Not under weights of the moment: the own adapters are scored, too."""
        own = self._own(split).raw
        normalised = {}
        for name in own:
            higher = self.taskset.tasks[name].higher_is_better
            above, below = (found.raw[name], own[name]) if higher else (own[name], found.raw[name])
            normalised[name] = above / below if below else math.nan
        return Scores(found.raw, normalised, found.joint, found.intervals)

    def _score_own(self, split: Split) -> _Measured:
        scores, between = {}, {}
        for name in self.taskset.tasks:
            if name in self.adapters:
                with self.encoder.carrying(self.adapters[name]):
                    scores[name], between[name] = self._one(name, split)
        return _Measured(scores, intervals=between)

    def _one(self, name: str, split: Split) -> tuple[float, Interval]:
        """The task's metric under the weights of the moment."""
        if name in self._left:
            return self._by_harness([name], split)[name]
        metric, labels = self._metrics[name], self._labels(name, split)
        predicted = self._predicted(name, self._features(name, split))
        return metric.score(predicted, labels), metric.between(predicted, labels)

    def _features(self, name: str, split: Split) -> Tensor:
        batches, rows = self._prepared(name, split)
        if self.taskset.tasks[name].per == "input":
            return self.encoder.features(batches)
        tokens, count = self.encoder.features(batches, "patches"), len(rows[0].label)  # type: ignore[arg-type]
        if tokens.shape[1] < count:
            raise ConfigError(f"{count} labels a row for {tokens.shape[1]} patches", key=f"tasks.{name}")
        return tokens[:, tokens.shape[1] - count :]  # class tokens come first

    def _outputs(self, name: str, features: Tensor) -> Tensor:
        weight, bias = self.heads[name]
        if features.shape[-1] != weight.shape[1]:
            raise TensorError(
                f"the head takes {weight.shape[1]} features, the base model makes {features.shape[-1]}",
                file=self.taskset.path(str(self.taskset.tasks[name].head)), key="weight",
                remedy="Give the base model that the head was trained on, or its pooling",
            )  # fmt: skip
        return features @ weight.T + bias

    def _predicted(self, name: str, features: Tensor) -> Values:
        outputs, top = self._outputs(name, features), self._metrics[name].top
        if top is not None:
            return outputs.topk(top).indices.numpy()
        classes = bool(self.taskset.tasks[name].classes)
        return (outputs.argmax(-1) if classes else outputs[..., 0]).numpy()

    def _joined(self, names: Sequence[str], features: Mapping[str, Tensor], split: Split) -> tuple[Values, Values]:
        """Classes predicted among those of all the tasks, and the right ones; classes of one name are one."""
        classes = list(dict.fromkeys(label for name in names for label in self.taskset.tasks[name].classes))
        right, found = [], []
        for name in names:
            outputs = torch.full((len(features[name]), len(classes)), -math.inf)
            for head in names:
                at = torch.tensor([classes.index(label) for label in self.taskset.tasks[head].classes])
                outputs[:, at] = outputs[:, at].maximum(self._outputs(head, features[name]))
            own = np.array([classes.index(label) for label in self.taskset.tasks[name].classes])
            right.append(own[self._labels(name, split).astype(int)])
            found.append(outputs.argmax(-1).numpy())
        return np.concatenate(found), np.concatenate(right)

    def _by_harness(self, names: Sequence[str], split: Split) -> dict[str, tuple[float, Interval]]:
        tasks = {name: self.taskset.tasks[name] for name in names}
        return harness.run(self.encoder, tasks, self.taskset.folder, self._limits.get(split)) if names else {}

    def _labels(self, name: str, split: Split) -> Values:
        return np.array([row.label for row in self._prepared(name, split)[1]], dtype=float)

    def _prepare(self, name: str, split: Split) -> tuple[list[Placed], list[Row]]:
        rows = self.taskset.rows(name, split, self._limits.get(split))
        if self.taskset.tasks[name].per == "patch" and len({len(row.label) for row in rows}) > 1:  # type: ignore[arg-type]
            raise ConfigError("rows with different numbers of patches", file=self.taskset.folder, key=f"tasks.{name}")
        return self.encoder.batches(rows), rows


def _load_head(taskset: TaskSet, name: str) -> tuple[Tensor, Tensor]:
    """Weight (outputs, width) and bias (outputs,) in float32; a head without bias has zeros."""
    task = taskset.tasks[name]
    path = taskset.path(str(task.head))
    file = SafetensorsFile(path)
    tensors = {key: file.read(key) for key in file.entries}
    if "weight" not in tensors:
        raise TensorError("a head needs weight, and bias if it has one", file=path, key=next(iter(tensors), None))
    for key in tensors.keys() & {"weight", "bias"}:
        _check_head(path, key, tensors[key])
    weight = tensors["weight"].float()
    if len(weight) != task.outputs:
        raise TensorError(
            f"the head has {len(weight)} outputs, the task {task.outputs}",
            file=path,
            remedy=f"Correct the classes of {name} in {taskset.path(FILE)}",
        )
    bias = tensors.get("bias", torch.zeros(len(weight))).float()
    if len(bias) != len(weight):
        raise TensorError(
            f"a bias for {len(bias)} outputs beside a weight for {len(weight)}", file=path, key="bias",
            remedy="Save the head again, weight (outputs, width) and bias (outputs)",
        )  # fmt: skip
    return weight, bias


def _check_head(path: Path, key: str, tensor: Tensor) -> None:
    shape, wanted = list(tensor.shape), {"weight": 2, "bias": 1}[key]
    if tensor.ndim != wanted or 0 in shape:
        raise TensorError(
            f"of shape {shape}; a head's weight is (outputs, width), its bias (outputs)", file=path, key=key,
            remedy="Save the head again, as the weight and bias of a linear layer",
        )  # fmt: skip
    if not tensor.is_floating_point():
        raise TensorError("must hold floating point numbers", file=path, key=key, value=str(tensor.dtype))
    if odd := int((~tensor.double().isfinite()).sum()):
        raise TensorError(
            f"{odd} of {tensor.numel()} values are NaN or infinite", file=path, key=key,
            remedy="Train the head again, or use an earlier checkpoint of it",
        )  # fmt: skip
