"""Tasks with a head of their own: classification and regression on the features of a base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coremerge.errors import ConfigError, TensorError
from coremerge.evaluation.encoder import PATCHES, Encoder, pool
from coremerge.evaluation.heads import load_head, side_of
from coremerge.evaluation.labels import labels_of
from coremerge.evaluation.maps import assembled
from coremerge.evaluation.metrics import METRICS, Metric, find_metric
from coremerge.evaluation.resampling import Values
from coremerge.evaluation.scorer import Groups, Scored
from coremerge.evaluation.taskset import Split, TaskSet
from coremerge.learning.backbone import Batch, check_numbers, inputs_of
from coremerge.learning.rows import Example
from coremerge.learning.speech import Placed

MOST_SPECIAL = 8
"""Tokens before an image's patches, at most: one for the class, one for a teacher, four registers."""


Classifier = Callable[[Any, Batch], Tensor]
"""Of the backbone's output and its batch: what ``learn_weights`` takes for the objective entropy."""


class _Rows(NamedTuple):
    """A task's rows; tasks of the same inputs share the very same batches."""

    batches: list[Placed]
    labels: Values


class HeadScorer:
    """Linear heads on features: see :class:`~coremerge.evaluation.scorer.Scorer`.

    Tasks whose rows name the same inputs in the same order share one pass through the model. What it makes of them is
    dropped once they are scored, so that no more than one such set of features is in memory at a time.

    Attributes:
        heads: task → its head.

    Raises:
        SourceError: a head is not there.
        TensorError: it is none, or of another size than its task.
    """

    language: ClassVar[bool] = False

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        self.taskset = taskset
        self.heads = {name: load_head(taskset, name) for name in names}
        self._metrics = {name: _metric(taskset, name) for name in names}
        self._limits = limits
        self._known: dict[tuple[str, Split], _Rows] = {}
        self._batches: dict[tuple[Example, ...], list[Placed]] = {}

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> dict[str, Scored]:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        found: dict[str, Scored] = {}
        chosen: dict[tuple[str, str], Values] = {}
        for name, features in self._features(encoder, names, split):
            compared = self._comparable(name, features, self._rows(encoder, name, split).labels)
            found[name] = _scored(self._metrics[name], *compared, intervals)
            for group, members in groups.items():
                if name in members:
                    chosen[group, name] = self._joined(members, features)
            del features, compared  # before those of the next inputs are made
        for group, members in groups.items():
            right = [self._right(encoder, members, name, split) for name in members]
            guesses = [chosen[group, name] for name in members]
            found[group] = _scored(METRICS["accuracy"], np.concatenate(guesses), np.concatenate(right), intervals)
        return found

    def embeddings(self, encoder: Encoder, names: Sequence[str], split: Split) -> dict[str, Tensor]:
        """Task → features: (rows, width), or a row's patches on their own: (rows, patches, width)."""
        return dict(self._features(encoder, names, split))

    def classifiers(self, encoder: Encoder, names: Sequence[str]) -> dict[str, Classifier]:
        """Task of classification → what it makes of a batch's output: logits (rows, ..., classes); differentiable."""
        classes = [name for name in names if self.taskset.tasks[name].classes]
        return {name: partial(self._logits, encoder, name) for name in classes}

    def _logits(self, encoder: Encoder, name: str, output: Any, batch: Batch) -> Tensor:
        task = self.taskset.tasks[name]
        features = pool(output, batch, PATCHES if self._is_dense(name) else encoder.pooling)
        if self._is_dense(name) and (patches := encoder.patches(batch)) is not None:
            features = features[:, max(0, features.shape[1] - patches) :]
        weight, bias = (part.to(features.device) for part in self.heads[name])
        logits = features @ weight.T + bias
        return logits.reshape(*logits.shape[:-1], -1, len(task.classes)).squeeze(-2)

    def count(self, encoder: Encoder, name: str, split: Split) -> int:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        return len(self._rows(encoder, name, split).labels)

    def _features(self, encoder: Encoder, names: Sequence[str], split: Split) -> Iterator[tuple[str, Tensor]]:
        """Each task's, in passes over the inputs that several have."""
        shared: dict[int, list[str]] = {}
        for name in names:
            shared.setdefault(id(self._rows(encoder, name, split).batches), []).append(name)
        for members in shared.values():
            wanted = {PATCHES if self._is_dense(name) else encoder.pooling for name in members}
            batches = self._rows(encoder, members[0], split).batches
            features = encoder.pooled(batches, sorted(wanted))
            for name in members:
                if self._is_dense(name):
                    yield name, self._patches(encoder, name, split, features[PATCHES])
                else:
                    yield name, features[encoder.pooling]
            del features

    def _is_dense(self, name: str) -> bool:
        return self.taskset.tasks[name].per != "input"

    def _patches(self, encoder: Encoder, name: str, split: Split, tokens: Tensor) -> Tensor:
        """Those that have labels: (rows, patches, width)."""
        batches, labels = self._rows(encoder, name, split)
        count = math.prod(self._grid(name, labels)) if self.taskset.tasks[name].per == "pixel" else labels.shape[1]
        known = encoder.patches(batches[0][1])
        if known is None or not 0 <= tokens.shape[1] - known <= MOST_SPECIAL:
            known = count if tokens.shape[1] >= count else tokens.shape[1]
        if count != known:
            self._refuse_count(name, count, known)
        return tokens[:, tokens.shape[1] - count :]  # class tokens come first

    def _refuse_count(self, name: str, count: int, known: int) -> None:
        if self.taskset.tasks[name].per == "patch":
            raise ConfigError(f"{count} labels a row for {known} patches", key=f"tasks.{name}")
        raise ConfigError(
            f"maps for {count} patches, and the base model sees {known}", key=f"tasks.{name}",
            remedy="Give maps and a head of k pixels a patch and side, and images of the size that was trained on",
        )  # fmt: skip

    def _grid(self, name: str, labels: Values) -> tuple[int, int]:
        """Patches down and across that the maps (rows, height, width, ...) are of."""
        height, width = labels.shape[1:3]
        side = self._side(name)
        if height % side or width % side:
            raise ConfigError(
                f"maps of {height} × {width}, which {side} pixels a patch and side do not divide", key=f"tasks.{name}",
                remedy=f"The head gives {side} × {side} pixels a patch: save maps of as many for each",
            )  # fmt: skip
        return height // side, width // side

    def _side(self, name: str) -> int:
        return side_of(self.taskset.tasks[name], len(self.heads[name].weight))

    def _outputs(self, name: str, features: Tensor) -> Tensor:
        head = self.heads[name]
        if features.shape[-1] != head.weight.shape[1]:
            raise TensorError(
                f"the head takes {head.weight.shape[1]} features, the base model makes {features.shape[-1]}",
                file=self.taskset.path(str(self.taskset.tasks[name].head)), key="weight",
                remedy="Give the base model that the head was trained on, or its pooling",
            )  # fmt: skip
        outputs: Tensor = head(features)
        with inputs_of(name):
            check_numbers(outputs)
        return outputs

    def _comparable(self, name: str, features: Tensor, labels: Values) -> tuple[Values, Values]:
        """Predictions and labels as metrics take them."""
        task, metric = self.taskset.tasks[name], self._metrics[name]
        outputs = self._outputs(name, features)
        if task.per == "pixel":
            outputs = assembled(outputs, self._grid(name, labels), self._side(name)).flatten(1, 2)
            labels = labels.reshape(len(labels), -1, *([task.outputs] if task.outputs > 1 else []))
        elif task.per == "input" and task.outputs > 1:
            outputs, labels = outputs[:, None], labels[:, None]
        if metric.top is not None:
            return outputs.topk(metric.top).indices.numpy(), labels
        if task.classes:
            return outputs.argmax(-1).numpy(), labels
        found = (outputs if task.outputs > 1 else outputs[..., 0]).numpy()
        coded = metric.directions and task.per == "pixel"
        return (2 * found - 1, 2 * labels - 1) if coded else (found, labels)

    def _joined(self, names: Sequence[str], features: Tensor) -> Values:
        """Classes predicted among those of all the tasks; classes of one name are one."""
        classes = self._classes(names)
        outputs = torch.full((len(features), len(classes)), -math.inf)
        for head in names:
            at = torch.tensor([classes.index(label) for label in self.taskset.tasks[head].classes])
            outputs[:, at] = outputs[:, at].maximum(self._outputs(head, features))
        found: Values = outputs.argmax(-1).numpy()
        return found

    def _right(self, encoder: Encoder, names: Sequence[str], name: str, split: Split) -> Values:
        """The right ones of a task's rows among the classes of all the tasks."""
        classes = self._classes(names)
        own = np.array([classes.index(label) for label in self.taskset.tasks[name].classes])
        found: Values = own[self._rows(encoder, name, split).labels.astype(int)]
        return found

    def _classes(self, names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(label for name in names for label in self.taskset.tasks[name].classes))

    def _rows(self, encoder: Encoder, name: str, split: Split) -> _Rows:
        if (name, split) not in self._known:
            rows = self.taskset.rows(name, split, self._limits.get(split))
            labels = labels_of(rows, self.taskset.tasks[name], name)
            inputs = tuple(row.example for row in rows)
            if inputs not in self._batches:
                self._batches[inputs] = encoder.batches(rows)
            self._known[name, split] = _Rows(self._batches[inputs], labels)
        return self._known[name, split]


def _metric(taskset: TaskSet, name: str) -> Metric:
    metric = find_metric(taskset.tasks[name].metric)
    assert metric is not None, "the task set has checked it"
    return metric


def _scored(metric: Metric, predictions: Values, labels: Values, intervals: bool) -> Scored:
    between = metric.between(predictions, labels) if intervals else None
    return Scored(metric.score(predictions, labels), between)
