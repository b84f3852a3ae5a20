"""Merge weights learned from unlabelled inputs, and the null-space ratio that they can be learned from."""

from __future__ import annotations

from coremerge.learning.measure import measure_null_space
from coremerge.learning.ratio import null_space_ratio
from coremerge.learning.result import Weights, read_weights
from coremerge.learning.weights import PRESETS, Settings, learn_weights

__all__ = [
    "PRESETS",
    "Settings",
    "Weights",
    "learn_weights",
    "measure_null_space",
    "null_space_ratio",
    "read_weights",
]
