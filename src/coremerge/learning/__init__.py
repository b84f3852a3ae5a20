"""Merge weights learned from unlabelled inputs, and the null-space ratio that they can be learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coremerge.learning.fit import FitReport, fit
from coremerge.learning.measure import measure_null_space
from coremerge.learning.own_answers import answered_batches
from coremerge.learning.ratio import null_space_ratio
from coremerge.learning.result import Weights, read_weights
from coremerge.learning.settings import PRESETS, Settings
from coremerge.learning.weights import learn_weights

if TYPE_CHECKING:
    from coremerge.learning.callback import NullSpaceCallback

__all__ = [
    "PRESETS",
    "FitReport",
    "NullSpaceCallback",
    "Settings",
    "Weights",
    "answered_batches",
    "fit",
    "learn_weights",
    "measure_null_space",
    "null_space_ratio",
    "read_weights",
]


def __getattr__(name: str) -> Any:
    if name != "NullSpaceCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from coremerge.learning.callback import NullSpaceCallback
    except ImportError:
        from coremerge.errors import MissingExtraError
        from coremerge.installing import install

        raise MissingExtraError("the callback needs transformers", remedy=install("learn")) from None
    return NullSpaceCallback
