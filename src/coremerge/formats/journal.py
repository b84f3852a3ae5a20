"""A file of finished parts that outlives a crash: parts are appended, each is whole or absent, and they are read again.

After the head (a line of JSON) come records: length and CRC-32 of what follows, then a JSON object and tensors as a
safetensors file. What a crash left half written at the end is cut off.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from coremerge.errors import ConfigError, OutputError, SourceError
from coremerge.formats.safetensors_layout import writing

FORMAT = "coremerge.journal.1"
RECORD = struct.Struct("<QII")
"""Bytes of a record, of which its JSON object; CRC-32 of both parts."""
LONGEST_HEAD = 1 << 16


class Part(NamedTuple):
    """What was finished: plain facts, and tensors."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class Journal:
    """A journal that is open to be added to; made if it is not there.

    Args:
        path: of the file.
        mark: of all that its parts depend on, so that no others are taken for them.

    Attributes:
        parts: those that were there.

    Raises:
        SourceError: the file is there, and is no journal.
        ConfigError: it has another mark.
        OutputError: it cannot be written, or another process has it open.
    """

    def __init__(self, path: str | Path, mark: str) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file, self.path)
            held = self._head(mark)
            self.parts = list(self._read(held))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """One more part; on the disk when this returns."""
        said = json.dumps(facts).encode()
        body = said + save({key: value.contiguous() for key, value in tensors.items()})
        with writing(self.path):
            _write_all(self._file, RECORD.pack(len(body), len(said), zlib.crc32(body)) + body)
            os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file, and of the lock on it."""
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _head(self, mark: str) -> int:
        """Where the records begin; a new file gets its head."""
        head = json.dumps({"format": FORMAT, "mark": mark}).encode() + b"\n"
        found = os.pread(self._file, LONGEST_HEAD, 0)
        if head.startswith(found) and head != found:  # new, or stopped in its first moment
            with writing(self.path):
                _write_all(self._file, head)
                os.fsync(self._file)
            return len(head)
        line, _, _ = found.partition(b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise SourceError("is no journal of finished parts", file=self.path, remedy="Name another file")
        if said.get("mark") != mark:
            raise ConfigError(
                "belongs to other adapters, inputs or settings", key="resume", value=str(self.path),
                remedy="Remove it to begin anew, or give what it was begun with",
            )  # fmt: skip
        return len(line) + 1

    def _read(self, at: int) -> Iterator[Part]:
        """All whole records; the file is left at their end, without what comes after it."""
        size = os.fstat(self._file).st_size
        while True:
            head = os.pread(self._file, RECORD.size, at)
            length, of_facts, check = RECORD.unpack(head) if len(head) == RECORD.size else (0, 0, 0)
            end = at + RECORD.size + length
            if not of_facts <= length <= size or end > size or not length:
                break
            body = os.pread(self._file, length, at + RECORD.size)
            if zlib.crc32(body) != check:
                break
            yield Part(json.loads(body[:of_facts]), load(body[of_facts:]))
            at = end
        with writing(self.path):
            os.ftruncate(self._file, at)
        os.lseek(self._file, at, os.SEEK_SET)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _lock(descriptor: int, path: Path) -> None:
    """Refuse a file that another process has open here; where there are no locks, there is nothing to refuse by."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError("another process is at work on it", file=path, remedy="Wait for it, or stop it") from None
        except OSError:  # a file system without locks
            return
