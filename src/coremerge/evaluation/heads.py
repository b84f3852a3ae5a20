"""Linear heads, one beside each task's adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from coremerge.errors import TensorError
from coremerge.evaluation.taskset import FILE, Task, TaskSet
from coremerge.formats.safetensors_file import SafetensorsFile


class Head(NamedTuple):
    """A linear layer on features, in float32."""

    weight: Tensor
    """(outputs, width)"""
    bias: Tensor
    """(outputs,); zeros where the file has none."""

    def __call__(self, features: Tensor) -> Tensor:
        """(..., width) → (..., outputs)."""
        return features @ self.weight.T + self.bias


def load_head(taskset: TaskSet, name: str) -> Head:
    """The head of a task.

    Raises:
        SourceError: it is not there.
        TensorError: it is no linear layer, or gives another number of outputs than the task needs.
    """
    task = taskset.tasks[name]
    path = taskset.path(str(task.head))
    file = SafetensorsFile(path)
    tensors = {key: file.read(key) for key in file.entries}
    if "weight" not in tensors:
        raise TensorError("a head needs weight, and bias if it has one", file=path, key=next(iter(tensors), None))
    for key in tensors.keys() & {"weight", "bias"}:
        _check_head(path, key, tensors[key])
    weight = tensors["weight"].float()
    if not fits(task, len(weight)):
        needed = f"{task.channels} times a square number" if task.per == "pixel" else str(task.channels)
        raise TensorError(
            f"the head has {len(weight)} outputs, the task {needed}",
            file=path,
            remedy=f"Correct the {'classes' if task.classes else 'outputs'} of {name} in {taskset.path(FILE)}",
        )
    bias = tensors.get("bias", torch.zeros(len(weight))).float()
    if len(bias) != len(weight):
        raise TensorError(
            f"a bias for {len(bias)} outputs beside a weight for {len(weight)}", file=path, key="bias",
            remedy="Save the head again, weight (outputs, width) and bias (outputs)",
        )  # fmt: skip
    return Head(weight, bias)


def fits(task: Task, outputs: int) -> bool:
    """Whether a head with so many outputs is one of the task; per pixel it gives a square of them for each patch."""
    if task.per == "pixel":
        return outputs % task.channels == 0 and side_of(task, outputs) ** 2 * task.channels == outputs
    return outputs == task.channels


def side_of(task: Task, outputs: int) -> int:
    """Pixels a side of a patch for which a head with so many outputs gives numbers."""
    return math.isqrt(outputs // task.channels)


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
