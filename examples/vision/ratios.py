"""An adapter's own null-space ratio: of the inputs of its modules in the model that carries it, on its own pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from backbone import pixels
from numpy.typing import NDArray
from transformers import Dinov2Model

import coremerge
from coremerge.learning import measure_null_space


def own_ratios(base: Dinov2Model, adapter: Path, images: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
    """Module → the adapter's own ratio, and that of random rows of the same shape."""
    loaded = coremerge.load(adapter)
    batches = [{"pixel_values": pixels(images[i : i + 16]).float()} for i in range(0, len(images), 16)]
    found = measure_null_space(base, {"own": loaded}, {"own": batches}, weights={"own": 1})["own"]["own"]
    return {name: (ratio, _random(*loaded[name].right.shape)) for name, ratio in found.items()}


def _random(rank: int, width: int) -> float:
    return math.sqrt(1 - rank / width)
