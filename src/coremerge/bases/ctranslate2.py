"""Variables of a model that CTranslate2 runs: its file ``model.bin``.

Source: OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py, binary version 6. All numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VERSION = 6

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Bytes:
    """A file's bytes, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"ends at {len(self.data)} bytes, and more is announced")
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> int:
        """``B``, ``H`` or ``I``: of 1, 2 or 4 bytes."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode()

    def tensor(self) -> Tensor:
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = _DTYPES.get(self.number("B"))
        size = self.number("I")
        if kind is None or math.prod(shape) * np.dtype(kind).itemsize != size:
            raise ValueError(f"a variable of shape {shape} in {size} bytes")
        return torch.from_numpy(np.frombuffer(self.take(size), kind).reshape(shape).copy())


def read_variables(path: Path, spec: str) -> dict[str, Tensor]:
    """Name → variable, second names included.

    Args:
        path: the file.
        spec: the kind of model that it must be, such as ``WhisperSpec``.

    Raises:
        ValueError: it is another, or the file is damaged.
    """
    data = _Bytes(path.read_bytes())
    version = data.number("I")
    if version != VERSION:
        raise ValueError(f"no file of CTranslate2's binary version {VERSION}: version {version}")
    if (found := data.text()) != spec:
        raise ValueError(f"a model of the kind {found}, not {spec}")
    data.number("I")  # of the spec: what it changed is in the names
    variables = {data.text(): data.tensor() for _ in range(data.number("I"))}
    for _ in range(data.number("I")):
        alias, name = data.text(), data.text()
        variables[alias] = variables[name]
    return variables
