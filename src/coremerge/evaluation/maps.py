"""Maps of labels, as images beside the rows: a class's index or a value for each pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation.resampling import Values
from coremerge.learning.optional import first_line, optional

_LARGEST = {"L": 255, "RGB": 255, "1": 1, "I;16": 65535, "I;16B": 65535, "I": 65535}
"""Of the kinds of images that hold values: grey with 8, 1 or 16 bits, and RGB."""
_INDICES = {*_LARGEST, "P"} - {"RGB"}


def read_values(path: Path, channels: int, place: str) -> Values:
    """A map of numbers: (height, width, channels) in 0 to 1, float32.

    Args:
        path: grey of 8 or 16 bits for one channel, RGB for three.
        channels: that the task predicts.
        place: what names the file, for messages.

    Raises:
        SourceError: it cannot be read.
        ConfigError: it is another kind of image.
    """
    pixels, mode = _pixels(path, place)
    found = 3 if mode == "RGB" else 1
    if mode not in _LARGEST or found != channels:
        raise ConfigError(
            f"{channels} values a pixel are asked for, and this image is {mode}", file=path, key="label",
            remedy=f"Save a map of grey (8 or 16 bits) for outputs: 1, of RGB for outputs: 3; {place} names it",
        )  # fmt: skip
    return (pixels.astype(np.float32) / _LARGEST[mode]).reshape(*pixels.shape[:2], channels)


def read_classes(path: Path, classes: int, place: str) -> Values:
    """A map of classes: (height, width), indices in int64.

    Args:
        path: grey of 8 or 16 bits, or with a palette: what a pixel holds is the index.
        classes: how many there are.
        place: what names the file, for messages.

    Raises:
        SourceError: it cannot be read.
        ConfigError: it is another kind of image, or has a pixel without a class.
    """
    pixels, mode = _pixels(path, place)
    if mode not in _INDICES:
        raise ConfigError(
            f"one class a pixel is needed, and this image is {mode}", file=path, key="label",
            remedy=f"Save it as grey or with a palette, a class's index for each pixel; {place} names it",
        )  # fmt: skip
    indices = pixels.astype(np.int64)
    outside = [int(index) for index in (indices.min(), indices.max()) if not 0 <= index < classes]
    if outside:
        raise ConfigError(
            f"a pixel of no class: the {classes} classes are 0 to {classes - 1}", file=path, key="label",
            value=outside[0], remedy="Write each pixel's index among the classes (for a mask 1, not 255)",
        )  # fmt: skip
    return indices


def assembled(outputs: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Maps from what a head gives for each patch.

    Args:
        outputs: (rows, patches, side · side · channels), patches row by row, a patch's numbers in the order
            (y, x, channel).
        grid: patches down and across.
        side: pixels a patch and side.

    Returns:
        (rows, height, width, channels).
    """
    patches = outputs.reshape(len(outputs), *grid, side, side, -1)  # (rows, down, across, y, x, channels)
    return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _pixels(path: Path, place: str) -> tuple[Values, str]:
    image = optional("PIL.Image")
    try:
        with image.open(path) as picture:
            return np.asarray(picture), str(picture.mode)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise SourceError(
            f"this map cannot be read: {first_line(error)}", file=place, key="label", value=str(path)
        ) from None
