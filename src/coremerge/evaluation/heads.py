"""Tasks with a head of their own: classification and regression on the features of a base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from coremerge.errors import ConfigError, TensorError
from coremerge.evaluation.encoder import Encoder, Placed
from coremerge.evaluation.metrics import METRICS, Metric, Values, find_metric
from coremerge.evaluation.scorer import Groups, Scored
from coremerge.evaluation.taskset import FILE, Row, Split, TaskSet
from coremerge.formats.safetensors_file import SafetensorsFile


class HeadScorer:
    """Linear heads on features: see :class:`~coremerge.evaluation.scorer.Scorer`.

    Attributes:
        heads: task → weight (outputs, width) and bias (outputs,), in float32.

    Raises:
        SourceError: a head is not there.
        TensorError: it is none, or of another size than its task.
    """

    language: ClassVar[bool] = False

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        self.taskset = taskset
        self.heads = {name: _load_head(taskset, name) for name in names}
        self._metrics = {name: _metric(taskset, name) for name in names}
        self._limits = limits
        self._known: dict[tuple[str, Split], tuple[list[Placed], list[Row]]] = {}

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> dict[str, Scored]:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        features = {name: self._features(encoder, name, split) for name in names}
        found = {
            name: (self._metrics[name], self._predicted(name, features[name]), self._labels(encoder, name, split))
            for name in names
        }
        joined = {
            group: (METRICS["accuracy"], *self._joined(encoder, members, features, split))
            for group, members in groups.items()
        }
        return {name: _scored(*values, intervals) for name, values in (found | joined).items()}

    def embeddings(self, encoder: Encoder, split: Split) -> dict[str, Tensor]:
        """Task → features: (rows, width), or a row's patches on their own: (rows, patches, width)."""
        return {name: self._features(encoder, name, split) for name in self.heads}

    def count(self, encoder: Encoder, name: str, split: Split) -> int:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        return len(self._prepared(encoder, name, split)[1])

    def _features(self, encoder: Encoder, name: str, split: Split) -> Tensor:
        batches, rows = self._prepared(encoder, name, split)
        if self.taskset.tasks[name].per == "input":
            return encoder.features(batches)
        tokens, count = encoder.features(batches, "patches"), len(rows[0].label)  # type: ignore[arg-type]
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

    def _joined(
        self, encoder: Encoder, names: Sequence[str], features: Mapping[str, Tensor], split: Split
    ) -> tuple[Values, Values]:
        """Classes predicted among those of all the tasks, and the right ones; classes of one name are one."""
        classes = list(dict.fromkeys(label for name in names for label in self.taskset.tasks[name].classes))
        right, found = [], []
        for name in names:
            outputs = torch.full((len(features[name]), len(classes)), -math.inf)
            for head in names:
                at = torch.tensor([classes.index(label) for label in self.taskset.tasks[head].classes])
                outputs[:, at] = outputs[:, at].maximum(self._outputs(head, features[name]))
            own = np.array([classes.index(label) for label in self.taskset.tasks[name].classes])
            right.append(own[self._labels(encoder, name, split).astype(int)])
            found.append(outputs.argmax(-1).numpy())
        return np.concatenate(found), np.concatenate(right)

    def _labels(self, encoder: Encoder, name: str, split: Split) -> Values:
        return np.array([row.label for row in self._prepared(encoder, name, split)[1]], dtype=float)

    def _prepared(self, encoder: Encoder, name: str, split: Split) -> tuple[list[Placed], list[Row]]:
        if (name, split) not in self._known:
            rows = self.taskset.rows(name, split, self._limits.get(split))
            self._check_patches(name, rows)
            self._known[name, split] = encoder.batches(rows), rows
        return self._known[name, split]

    def _check_patches(self, name: str, rows: Sequence[Row]) -> None:
        if self.taskset.tasks[name].per == "patch" and len({len(row.label) for row in rows}) > 1:  # type: ignore[arg-type]
            raise ConfigError("rows with different numbers of patches", file=self.taskset.folder, key=f"tasks.{name}")


def _metric(taskset: TaskSet, name: str) -> Metric:
    metric = find_metric(taskset.tasks[name].metric)
    assert metric is not None, "the task set has checked it"
    return metric


def _scored(metric: Metric, predictions: Values, labels: Values, intervals: bool) -> Scored:
    between = metric.between(predictions, labels) if intervals else None
    return Scored(metric.score(predictions, labels), between)


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
