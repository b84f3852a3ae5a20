"""What heads answer: targets as numbers, losses, and probes on the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from tasks import Task
from torch import Tensor, nn

FACTOR = 2
"""A map's side over that of the patches."""
PATCHES = 8
PENALTIES = {"classification": (1e-2, 1.0, 100.0), "regression": (1.0, 30.0, 1000.0)}
PROBED = 20_000
"""Rows that a probe of patches is fitted on, at most."""


class Targets:
    """A task's labels as numbers, one row a picture, or (64 patches, 4 · values) of a map.

    Args:
        labels: of the training pictures, classes' names, numbers, or maps' 8 bits.
    """

    def __init__(self, task: Task, labels: Sequence[Any] | NDArray[Any]) -> None:
        self.task = task
        self.mean, self.deviation = torch.zeros(1), torch.ones(1)
        if not task.classes:
            values = self._values(labels).reshape(-1, task.outputs)
            self.mean, self.deviation = values.mean(0), values.std(0)

    @property
    def outputs(self) -> int:
        """Rows of the head."""
        return (len(self.task.classes) or self.task.outputs) * (FACTOR**2 if self.task.pixels else 1)

    def encode(self, labels: Sequence[Any] | NDArray[Any]) -> Tensor:
        """Classes' indices, or standardised values (..., outputs of one place)."""
        if not self.task.classes:
            return (self._values(labels) - self.mean) / self.deviation
        if self.task.pixels:
            return _by_patch(torch.from_numpy(np.stack(list(labels))).long()[..., None])[..., 0]
        return torch.tensor([self.task.classes.index(str(label)) for label in labels])

    def _values(self, labels: Sequence[Any] | NDArray[Any]) -> Tensor:
        values = torch.from_numpy(np.asarray(labels, np.float32))
        if self.task.pixels:
            return _by_patch(values.reshape(len(values), *values.shape[1:3], -1) / 255)
        return values.reshape(len(values), -1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of the head's outputs."""
        if not self.task.classes:
            return nn.functional.mse_loss(outputs.reshape(targets.shape), targets)
        return nn.functional.cross_entropy(outputs.reshape(-1, len(self.task.classes)), targets.flatten())

    def agreement(self, outputs: Tensor, targets: Tensor) -> float:
        """Accuracy, or the share of the variance that is explained: to choose by."""
        if self.task.classes:
            found = outputs.reshape(-1, len(self.task.classes)).argmax(-1)
            return float((found == targets.flatten()).float().mean())
        return 1 - float(nn.functional.mse_loss(outputs.reshape(targets.shape), targets) / targets.var())

    def in_units(self, head: nn.Linear) -> dict[str, Tensor]:
        """The head's tensors so that a regression answers in the labels' own units."""
        repeat = self.outputs // len(self.mean) if not self.task.classes else self.outputs
        mean, deviation = self.mean.repeat(repeat), self.deviation.repeat(repeat)
        return {
            "weight": head.weight.detach() * deviation[:, None],
            "bias": head.bias.detach() * deviation + mean,
        }


def _by_patch(maps: Tensor) -> Tensor:
    """(n, 16, 16, c) → (n, 64, 4, c): the places of each patch, row by row."""
    n, c = len(maps), maps.shape[-1]
    parts = maps.reshape(n, PATCHES, FACTOR, PATCHES, FACTOR, c).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, PATCHES**2, FACTOR**2, c)


def features(task: Task, tokens: Tensor) -> Tensor:
    """What a head is on: each patch's token, or the mean of all tokens."""
    return tokens[:, 1:] if task.pixels else tokens.mean(1)


def probe(targets: Targets, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> nn.Linear:
    """The linear head that does best on features of the frozen base; its penalty is chosen on validation rows."""
    tried = []
    for penalty in PENALTIES[targets.task.kind]:
        head = _fitted(targets, *train, penalty)
        with torch.no_grad():
            tried.append((targets.agreement(head(validation[0]), validation[1]), head))
    return max(tried, key=lambda pair: pair[0])[1]


def _fitted(targets: Targets, x: Tensor, y: Tensor, penalty: float) -> nn.Linear:
    flat = x.reshape(-1, x.shape[-1]).numpy()
    labels = y.reshape(len(flat), -1).numpy()
    some = np.random.default_rng(0).permutation(len(flat))[:PROBED]
    head = nn.Linear(x.shape[-1], targets.outputs).requires_grad_(False)
    if targets.task.classes:
        parts = [
            _logistic(len(targets.task.classes), flat[some], labels[some, k], penalty) for k in range(labels.shape[1])
        ]
        weight, bias = (np.concatenate(part) for part in zip(*parts, strict=True))
    else:
        found = Ridge(alpha=penalty).fit(flat[some], labels[some])
        weight, bias = found.coef_.reshape(targets.outputs, -1), found.intercept_
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(np.atleast_1d(bias)))
    return head


def _logistic(classes: int, x: NDArray[Any], y: NDArray[Any], penalty: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight and bias for every class; those of two classes are half a binary one's and its opposite."""
    found = LogisticRegression(C=1 / penalty, max_iter=200).fit(x, y)
    weight, bias = found.coef_, found.intercept_
    if classes == 2:
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    rows, places = np.zeros((classes, x.shape[1])), np.full(classes, -20.0)  # classes that never occur
    rows[found.classes_], places[found.classes_] = weight, bias
    return rows, places
