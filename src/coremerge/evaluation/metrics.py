"""Scores of a head's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest output (rows, classes) is that of the label (rows,)."""
    return float((outputs.argmax(-1) == labels).double().mean())


def pearson(outputs: Tensor, labels: Tensor) -> float:
    """Correlation of outputs (rows, 1) with labels (rows,); 0 where either is constant."""
    pair = torch.stack([outputs[:, 0], labels]).double()
    centred = pair - pair.mean(-1, keepdim=True)
    norms = centred.norm(dim=-1).prod()
    return float(centred.prod(0).sum() / norms) if norms > 0 else 0.0


METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {"accuracy": accuracy, "pearson": pearson}
