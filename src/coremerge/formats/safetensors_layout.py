"""A ``.safetensors`` file laid out before its numbers exist, then filled in any order, from any thread."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOENT, ENOSPC, EROFS
from pathlib import Path

import torch
from torch import Tensor

from coremerge.errors import ConfigError, OutputError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""torch's dtypes as the format spells them."""

OUTPUT_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
}  # fmt: skip
_WIDTHS = {name: dtype.itemsize for dtype, name in NAMES.items()}


def output_dtype(value: torch.dtype | str) -> torch.dtype:
    """A dtype that weights can be written in, from torch's own or one of its usual names.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> output_dtype("bf16"), output_dtype(torch.float32)
        (torch.bfloat16, torch.float32)
    """
    found = OUTPUT_DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ConfigError(
            "not a dtype that weights can be written in",
            key="dtype", value=str(value), remedy="One of float32, float16, bfloat16, float64",
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes: dtype as the format spells it, shape, and its bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A whole file but for its numbers.

    Attributes:
        slots: tensor name → :class:`Slot`.
        metadata: the file's own string pairs.
    """

    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> Layout:
        """Tensors side by side, wide dtypes first (so that all are aligned), then by name.

        Args:
            shapes: tensor name → dtype as the format spells it, and shape.
            metadata: ``{"format": "pt"}`` by default.

        Example:
            >>> Layout.of({"b": ("F16", (3,)), "a": ("F32", (2, 2))}).slots["b"]
            Slot(dtype='F16', shape=(3,), start=16, end=22)
        """
        sized = {
            key: (dtype, shape, math.prod(shape) * _WIDTHS[dtype]) for key, (dtype, shape) in sorted(shapes.items())
        }
        return cls.packed(sized, {"format": "pt"} if metadata is None else metadata)

    @classmethod
    def packed(cls, sized: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> Layout:
        """Tensors of any dtype and known size in bytes: wide dtypes first, else in the order given."""

        def width(key: str) -> float:
            _, shape, size = sized[key]
            return size / max(1, math.prod(shape))

        slots, at = {}, 0
        for key in sorted(sized, key=width, reverse=True):
            dtype, shape, size = sized[key]
            slots[key] = Slot(dtype, tuple(shape), at, at + size)
            at += size
        return cls(slots, metadata)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return max((slot.end for slot in self.slots.values()), default=0)

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return len(self.head) + self.data_bytes

    @property
    def head(self) -> bytes:
        """The bytes before the first tensor: its length, and a table in JSON."""
        table: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        for key, slot in self.slots.items():
            table[key] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (slot.start, slot.end)}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class TensorFile:
    """A file of :class:`Layout`, created at full length; what is not written stays zero.

    Raises:
        OutputError: it cannot be created or written: the disk is full, ...
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self._missing = {key for key, slot in layout.slots.items() if slot.end > slot.start}
        self._lock = threading.Lock()
        head = layout.head
        self._start = len(head)
        self.bytes = self._start + layout.data_bytes
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with writing(path):
                os.ftruncate(self._descriptor, self.bytes)
            self._put(head, 0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.close()

    def write(self, key: str, tensor: Tensor) -> None:
        """Put the whole tensor ``key``, of the layout's dtype and shape, in its place."""
        slot = self.layout.slots[key]
        if NAMES.get(tensor.dtype) != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{key}: laid out as {slot}, given {tensor.dtype} {tuple(tensor.shape)}")
        self.write_bytes(key, raw(tensor))
        self.done(key)

    def write_bytes(self, key: str, data: memoryview | bytes | bytearray, offset: int = 0) -> None:
        """Put ``data`` at ``offset`` within the tensor ``key``; call :meth:`done` after its last piece."""
        slot = self.layout.slots[key]
        if offset + len(data) > slot.end - slot.start:
            raise ValueError(f"{key}: {len(data)} bytes at {offset} do not fit {slot}")
        self._put(data, self._start + slot.start + offset)

    def done(self, key: str) -> None:
        """Say that ``key`` is complete."""
        with self._lock:
            self._missing.discard(key)

    def close(self) -> None:
        """Let go of the file, complete or not."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"{self.path}: {len(self._missing)} tensors were never written: {min(self._missing)}")
        with writing(self.path):
            os.fsync(self._descriptor)

    def _put(self, data: memoryview | bytes | bytearray, at: int) -> None:
        view, done = memoryview(data), 0
        with writing(self.path):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], at + done)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, not copied if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # a finite sum proves it in one pass; a sum that overflowed does not disprove it
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=wide).item()) or bool(torch.isfinite(tensor).all())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into an :class:`OutputError` about ``path`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from None


def write_error(path: Path, error: OSError) -> OutputError:
    """What ``error`` means to the person who asked for ``path``."""
    if error.errno in (ENOSPC, EDQUOT):
        return OutputError("the disk is full", file=path, remedy="Free some space, or write elsewhere")
    if isinstance(error, PermissionError) or error.errno == EROFS:
        return OutputError("may not be written", file=path, remedy="Choose a folder of your own")
    if error.errno == EFBIG:
        return OutputError(
            "larger than a file may be here", file=path, remedy="Raise the limit (ulimit -f), or write elsewhere"
        )
    if error.errno == ENOENT:
        return OutputError("its folder is gone", file=path, remedy="Check what removed it, and run the command again")
    remedy = "Check the disk, or write elsewhere"
    return OutputError(f"cannot be written: {error.strerror or error}", file=path, remedy=remedy)
