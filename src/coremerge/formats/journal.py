"""A file of finished parts that outlives a crash: parts are appended, each is whole or absent, and they are read again.

Facts are in memory, tensors are read when they are asked for.

After the head (a line of JSON) come records: length and CRC-32 of what follows, then a JSON object and tensors as a
safetensors file. What a crash left half written at the end is cut off.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coremerge.errors import ConfigError, OutputError, SourceError
from coremerge.formats.safetensors_layout import writing

FORMAT = "coremerge.journal.1"
RECORD = struct.Struct("<QII")
"""Bytes of a record, of which its JSON object; CRC-32 of both parts."""
LONGEST_HEAD = 1 << 16


class Part(NamedTuple):
    """What was finished: plain facts, and where its tensors are: see :meth:`Journal.tensors`."""

    facts: Mapping[str, Any]
    at: int
    length: int


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
        self._end = 0
        try:
            _lock(self._file, self.path)
            _check_still_there(self._file, self.path)
            held = self._head(mark)
            self.parts = list(self._read(held))
        except BaseException:
            self.close()
            raise

    @classmethod
    def temporary(cls, folder: Path) -> Journal:
        """One without a name, on the disk of ``folder``, that is gone when it is closed.

        Raises:
            OutputError: it cannot be written there.
        """
        made = cls.__new__(cls)
        made.path, made.parts, made._end = folder, [], 0
        with writing(folder), tempfile.TemporaryFile(dir=folder, prefix=".coremerge-") as file:
            made._file = os.dup(file.fileno())
        return made

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, sync: bool = True) -> Part:
        """One more part; on the disk when this returns, unless ``sync`` is left to a later one."""
        said = json.dumps(facts).encode()
        body = said + save({key: value.contiguous() for key, value in tensors.items()})
        with writing(self.path):
            self._append(RECORD.pack(len(body), len(said), zlib.crc32(body)) + body)
            if sync:
                os.fsync(self._file)
        return Part(facts, self._end - len(body) + len(said), len(body) - len(said))

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Those of a part of this journal, by name.

        Raises:
            SourceError: the file is no longer as it was.
        """
        body = self._bytes(part.at, part.length)
        if len(body) != part.length:
            raise SourceError("was cut while it was in use", file=self.path)
        return load(body)

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
                self._append(head)
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
            body = self._bytes(at + RECORD.size, length)
            facts = _facts(body, of_facts) if zlib.crc32(body) == check else None
            if facts is None:
                break
            yield Part(facts, end - length + of_facts, length - of_facts)
            at = end
        with writing(self.path):
            os.ftruncate(self._file, at)
        self._end = at

    def _bytes(self, at: int, length: int) -> bytes:
        """As many as there are: the system gives no more than 2 GB at once."""
        pieces: list[bytes] = []
        while length and (piece := os.pread(self._file, length, at)):
            pieces.append(piece)
            at, length = at + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, self._end)
            view, self._end = view[count:], self._end + count


def _facts(body: bytes, length: int) -> dict[str, Any] | None:
    """The facts of a record; None where ``length``, which the checksum does not cover, is not where they end."""
    try:
        facts, _ = json.loads(body[:length]), load(body[length:])
    except (ValueError, RecursionError, SafetensorError):
        return None
    return facts if isinstance(facts, dict) else None


def _lock(descriptor: int, path: Path) -> None:
    """Refuse a file that another process has open here; where there are no locks, there is nothing to refuse by."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None
        except OSError:  # a file system without locks
            return


def _check_still_there(descriptor: int, path: Path) -> None:
    """Refuse a file that the process which held the lock has removed meanwhile: what is added to it would be lost."""
    with writing(path):
        if not os.fstat(descriptor).st_nlink:
            raise _in_use(path)


def _in_use(path: Path) -> OutputError:
    return OutputError("another process is at work on it", file=path, remedy="Wait for it, or stop it")
