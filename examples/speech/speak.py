"""Sounds of phrases: flite says them, and they are kept at Whisper's rate in 8 bits."""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from phrases import Phrase

RATE = 16_000
"""Samples a second: Whisper's and these voices'."""
PITCHES = {"kal16": 105, "awb": 120, "rms": 100, "slt": 170}
"""Hertz, about the voices' own."""


def speak(phrase: Phrase) -> NDArray[np.float32]:
    """The samples (n,) at 16 kHz, in -1 … 1, rounded as they are kept."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        settings = {
            "int_f0_target_mean": PITCHES[phrase.voice] * phrase.pitch,
            "duration_stretch": phrase.stretch,
        }
        options = [part for key, value in settings.items() for part in ("--setf", f"{key}={value:.2f}")]
        subprocess.run(["flite", "-voice", phrase.voice, *options, "-t", phrase.text, "-o", str(path)], check=True)
        with wave.open(str(path)) as file:
            if file.getframerate() != RATE:
                raise ValueError(f"{phrase.voice} speaks at {file.getframerate()} samples a second, not at {RATE}")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
    loud = np.flatnonzero(np.abs(samples) > 300)
    sound = samples[max(0, loud[0] - RATE // 50) : loud[-1] + RATE // 20]  # without most of the pauses around it
    return (np.round(sound / np.abs(sound).max() * 120) / 128).astype(np.float32)


def keep(sound: NDArray[np.float32], path: Path) -> None:
    """Writes a WAV file of 8 bits, which have no sign there."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(RATE)
        file.writeframes((sound * 128 + 128).astype(np.uint8).tobytes())
