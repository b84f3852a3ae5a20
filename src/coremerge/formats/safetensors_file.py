"""Tensors of a ``.safetensors`` file, read one at a time into memory; no map and no handle stays open."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coremerge.errors import SourceError, TensorError
from coremerge.formats.config import LFS_MARK, LFS_REMEDY
from coremerge.hashing import changed, stamp_of, unreadable
from coremerge.memory import out_of_memory

HEADER_LIMIT = 32 * 2**20
"""Bytes of header: room for some 200,000 tensors."""

MOST_TENSORS = 200_000
"""Of a file: the largest adapters, of every expert of a large mixture, have some 100,000."""

LONGEST_NAME = 1000
"""Characters of a tensor's name: those of today's models have a hundred."""

MOST_DIMENSIONS = 8
"""Of a tensor: a convolution over space and time has five."""

LARGEST_SHAPE = 2**48
"""Entries of a tensor, empty dimensions counted as one: more than any disk holds, and safe to compute with."""

FACTOR_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EIGHT_BITS = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Floats that bfloat16 holds exactly; torch does not compute with them."""

_FACTORS = FACTOR_DTYPES | EIGHT_BITS
_OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                 "BOOL": torch.bool}  # fmt: skip
_DTYPES = _FACTORS | _OTHER_DTYPES


class Entry(NamedTuple):
    """One tensor of a file, before it is read: dtype as the format spells it, shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


class Tensors(Protocol):
    """A file of named tensors."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name → dtype and shape, known without reading any."""

    def read(self, key: str) -> Tensor:
        """The tensor of that name, as stored."""


def dtype_of(tensors: Tensors, key: str) -> torch.dtype:
    """The dtype of a factor.

    Raises:
        TensorError: it is not one of F64, F32, F16, BF16, or of the 8-bit floats.
    """
    name = tensors.entries[key].dtype
    if name not in _FACTORS:
        raise TensorError(
            f"stored as {name}, which is not a plain floating dtype",
            file=tensors.path,
            key=key,
            remedy=f"Save the adapter in one of {', '.join(FACTOR_DTYPES)}",
        )
    return _FACTORS[name]


def joint_dtype(tensors: Tensors, *keys: str) -> torch.dtype:
    """The narrowest dtype that holds what is stored under ``keys``.

    Raises:
        TensorError: as :func:`dtype_of`.
    """
    dtypes = {dtype_of(tensors, key) for key in keys}
    if len(dtypes) == 1:
        return dtypes.pop()
    return reduce(torch.promote_types, (torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in dtypes))


def read_factor(tensors: Tensors, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A factor in ``dtype``, checked to be finite.

    Raises:
        TensorError: NaN or infinite values, or a dtype that is no plain float.
    """
    dtype_of(tensors, key)
    return checked(tensors, key, tensors.read(key).to(dtype))


def read_pair(tensors: Tensors, keys: tuple[str, str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two factors, each as :func:`read_factor` gives it; in one go where they lie side by side in their file."""
    together = tensors.read_together(keys) if isinstance(tensors, SafetensorsFile) else None
    if together is not None:
        flat = together.to(dtype)
        if _finite(flat):
            first, second = (tensors.entries[key] for key in keys)
            sizes = [math.prod(entry.shape) for entry in (first, second)]
            parts = torch.split(flat, sizes if first.start < second.start else sizes[::-1])
            a, b = parts if first.start < second.start else parts[::-1]
            return a.view(first.shape), b.view(second.shape)
    return read_factor(tensors, keys[0], dtype), read_factor(tensors, keys[1], dtype)


def read_whole(tensors: Tensors, key: str) -> Tensor:
    """A tensor that is carried as it is (8-bit floats as bfloat16), checked to be finite."""
    tensor = tensors.read(key)
    return checked(tensors, key, tensor.bfloat16() if tensor.dtype in EIGHT_BITS.values() else tensor)


def checked(tensors: Tensors, key: str, tensor: Tensor) -> Tensor:
    """``tensor`` itself, once it is known to be finite."""
    if tensor.is_floating_point() and not _finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise TensorError(
            f"{bad} of {tensor.numel()} values are NaN or infinite",
            file=tensors.path,
            key=key,
            remedy="Training may have diverged: use an earlier checkpoint",
        )
    return tensor


def _finite(tensor: Tensor) -> bool:
    # a finite sum proves it in one pass; a sum that overflowed does not disprove it
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


class SafetensorsFile:
    """A validated ``.safetensors`` file, safe to read from several threads.

    Attributes:
        path: the file.
        stamp: of what was validated; nothing is read from what is there later.

    Raises:
        SourceError: not there, a Git LFS pointer, or not a safetensors file.
        TensorError: cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stamp = stamp_of(path)
            self._data_start = 8 + _header_length(path)
            _validate(path)
        except OSError as error:
            raise unreadable(path, error) from None

    @cached_property
    def _listed(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """What the header says; its JSON, many times larger, is not kept."""
        text = self._bytes(None, 8, self._data_start - 8)
        header: dict[str, dict[str, Any]] = json.loads(text, object_pairs_hook=self._once)
        metadata = header.pop("__metadata__", None) or {}
        entries = {key: Entry(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()}
        return _within_limits(self.path, entries), metadata

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name → dtype, shape and place."""
        return self._listed[0]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own string pairs."""
        return self._listed[1]

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Readers differ in which of two tensors of one name they take."""
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
            raise TensorError("is in the header twice", file=self.path, key=twice, remedy="Do not trust this file")
        return found

    def read(self, key: str) -> Tensor:
        """The tensor ``key``, in memory of its own.

        Raises:
            TensorError: a dtype torch cannot hold.
            SourceError: a file that is gone, or another, since it was opened.
        """
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise TensorError(f"dtype {entry.dtype} cannot be read", file=self.path, key=key)
        data = self._bytes(key, self._data_start + entry.start, entry.end - entry.start)
        if not data:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def read_together(self, keys: tuple[str, str]) -> Tensor | None:
        """The values of both tensors as they lie in the file; None unless side by side and of one floating dtype."""
        first, second = sorted((self.entries[key] for key in keys), key=lambda entry: entry.start)
        apart = first.end != second.start or first.dtype != second.dtype
        if apart or first.start == second.end or first.dtype not in _FACTORS:
            return None
        data = self._bytes(keys[0], self._data_start + first.start, second.end - first.start)
        return torch.frombuffer(data, dtype=_FACTORS[first.dtype])

    def _bytes(self, key: str | None, start: int, length: int) -> bytearray:
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                while done < length:
                    count = file.readinto(view[done:])
                    if not count:
                        break
                    done += count
                same = stamp_of(file.fileno()) == self.stamp
        except OSError as error:
            raise unreadable(self.path, error) from None
        if not same:
            raise changed(self.path)
        if done < length:
            raise TensorError("the file ends before the tensor does", file=self.path, key=key)
        return buffer


def _within_limits(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """``entries``, once nothing in them is absurd: before anything is allocated."""
    if len(entries) > MOST_TENSORS:
        raise TensorError(
            f"{len(entries):,} tensors are absurd (the most is {MOST_TENSORS:,})", file=path,
            remedy="Split the file, if it is not broken",
        )  # fmt: skip
    for key, entry in entries.items():
        if len(key) > LONGEST_NAME:
            raise TensorError(
                f"a name of {len(key):,} characters is absurd (the most is {LONGEST_NAME:,})", file=path,
                key=f"{key[:40]}...", remedy="Do not trust this file",
            )  # fmt: skip
        sides = [max(1, side) for side in entry.shape[:MOST_DIMENSIONS]]
        if len(entry.shape) > MOST_DIMENSIONS or math.prod(sides) > LARGEST_SHAPE:
            raise TensorError(
                f"an absurd shape of {len(entry.shape)} dimensions", file=path, key=key,
                value=entry.shape[:MOST_DIMENSIONS], remedy="Do not trust this file",
            )  # fmt: skip
    return entries


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_MARK):
        raise SourceError("this is a Git LFS pointer, not the file itself", file=path, remedy=LFS_REMEDY)
    if len(head) < 8:
        raise TensorError(f"cut short: only {len(head)} bytes", file=path, remedy="Download or save the file again")
    length: int = struct.unpack("<Q", head[:8])[0]
    if length > HEADER_LIMIT:
        pickled = head.startswith((b"PK\x03\x04", b"\x80\x02"))
        raise TensorError(
            "this is a pickle, not a safetensors file" if pickled else f"a header of {length} bytes is absurd",
            file=path,
            remedy="Save the adapter as safetensors (PEFT's default)",
        )
    return length


def _validate(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise TensorError(
            f"cut short, damaged, or not a safetensors file ({error})",
            file=path,
            remedy="Download or save the file again",
        ) from None


class PickledFile:
    """A legacy ``.bin`` checkpoint, unpickled by torch's safe subset (``weights_only=True``), whole in memory.

    Raises:
        SourceError: it cannot be read that way.
        TensorError: it holds something other than named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _unpickle(path)

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name → dtype and shape."""
        names = {dtype: name for name, dtype in _DTYPES.items()}
        listed = {
            key: Entry(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for key, tensor in self._tensors.items()
        }
        return _within_limits(self.path, listed)

    def read(self, key: str) -> Tensor:
        """The tensor ``key``."""
        return self._tensors[key]


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_MARK)) == LFS_MARK:
                raise SourceError("this is a Git LFS pointer, not the file itself", file=path, remedy=LFS_REMEDY)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except SourceError:
        raise
    except Exception as error:
        # torch raises whatever its unpickler met: pickle, zip, key, type and runtime errors
        if refusal := out_of_memory(error):
            raise refusal from None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"cannot be unpickled safely: {first}",
            file=path,
            remedy="Save the adapter as safetensors where it was trained",
        ) from None
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise TensorError("holds something other than named tensors", file=path)
    for key, tensor in value.items():
        _check_is_whole(path, key, tensor)
    return {key: tensor.detach() for key, tensor in value.items()}


def _check_is_whole(path: Path, key: str, tensor: Tensor) -> None:
    """Refuse a tensor that becomes larger than its file once it is computed with."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TensorError(
            "holds fewer numbers than its shape says", file=path, key=key, value=tuple(tensor.shape[:MOST_DIMENSIONS]),
            remedy="Save the adapter as safetensors where it was trained",
        )  # fmt: skip
