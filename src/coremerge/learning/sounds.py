"""Sounds: WAV files as the numbers that a feature extractor takes."""

from __future__ import annotations

import wave
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coremerge.errors import SourceError
from coremerge.learning.rows import Example

_TYPES = {1: "u1", 2: "<i2", 4: "<i4"}
"""Bytes of a sample → its numpy type; WAV's single bytes are without a sign."""


def read_sound(example: Example, rate: int) -> NDArray[np.float32]:
    """The samples (n,) in -1 … 1, channels averaged.

    Args:
        example: its ``audio`` is an uncompressed WAV file of 8, 16 or 32 bits, or the bytes of one.
        rate: samples a second that the model takes.

    Raises:
        SourceError: it cannot be read, or is of another rate.
    """
    source: Any = BytesIO(example.audio) if isinstance(example.audio, bytes) else str(example.audio)
    name = "bytes" if isinstance(example.audio, bytes) else str(example.audio)
    try:
        with wave.open(source) as file:
            found, channels, size = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = np.frombuffer(file.readframes(file.getnframes()), _TYPES[size])
    except (OSError, EOFError, wave.Error, KeyError, ValueError) as error:
        what = f"samples of {error} bytes" if isinstance(error, KeyError) else str(error)
        raise SourceError(
            f"this sound cannot be read: {what}", file=example.place or None, key="audio", value=name,
            remedy="Give an uncompressed WAV file of 16 bits",
        ) from None  # fmt: skip
    if found != rate:
        raise SourceError(
            f"{found:,} samples a second, and the base model takes {rate:,}", file=example.place or None, key="audio",
            value=name, remedy=f"Resample it: ffmpeg -i IN -ar {rate} OUT.wav",
        )  # fmt: skip
    centred = data.astype(np.float32) - (128 if size == 1 else 0)
    samples: NDArray[np.float32] = centred.reshape(-1, channels).mean(1) / np.float32(2 ** (8 * size - 1))
    return samples
