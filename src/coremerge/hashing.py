"""Which bytes were read: SHA-256 of files, worked out beside other work, and stamps that tell that a file has changed.

Imports nothing heavy, so that it can begin while torch is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from coremerge.errors import SourceError

_BLOCK = 4 << 20


class Stamp(NamedTuple):
    """What a file that is left alone keeps: its size, and the time of its last change."""

    size: int
    changed: int


def stamp_of(file: Path | int) -> Stamp:
    """Of a path, or an open file."""
    found = file.stat() if isinstance(file, Path) else os.fstat(file)
    return Stamp(found.st_size, found.st_mtime_ns)


def stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """File → its stamp now.

    Raises:
        SourceError: one of them is not there.
    """
    try:
        return {file: stamp_of(file) for file in files}
    except OSError as error:
        raise unreadable(Path(error.filename), error) from None


def unreadable(path: Path, error: OSError) -> SourceError:
    """What ``error`` means to the person who named ``path`` as an input."""
    remedy = "Check that it is still there and that you may read it, and run the command again"
    return SourceError(f"cannot be read: {error.strerror or error}", file=path, remedy=remedy)


def changed(path: Path) -> SourceError:
    """What is said of an input that is no longer what it was."""
    remedy = "Wait until nothing writes to it, and run the command again"
    return SourceError("changed while it was in use", file=path, remedy=remedy)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return _sha256(path, Event())


def _sha256(path: Path, stop: Event) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(block)) and not stop.is_set():
            digest.update(block[:count])
    return digest.hexdigest()


def check_unchanged(known: Mapping[Path, Stamp]) -> None:
    """Refuse files that no longer have the stamps that they are known by."""
    now = stamps(known)
    for file, stamp in known.items():
        if now[file] != stamp:
            raise changed(file)


def check_download(path: Path, sha256: str) -> None:
    """Refuse a file of the hub's cache that was damaged on its way: there a large file is named by its SHA-256.

    It is removed, as the hub's client would never look at it again.
    """
    real = Path(os.path.realpath(path))
    in_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if in_cache and len(real.name) == len(sha256) and real.name != sha256:
        with suppress(OSError):
            real.unlink()
        remedy = "It was removed from the cache: run the command again, and it is fetched anew"
        raise SourceError("not the bytes that the hub has", file=path, remedy=remedy)


class Hashes:
    """The SHA-256 of each file that was started, by one thread, each file once, and again once it has changed.

    Example:
        >>> with Hashes() as hashes:
        ...     hashes.start(Path(os.devnull))
        ...     hashes[Path(os.devnull)][:8]
        'e3b0c442'
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._started: dict[tuple[str, Stamp | None], Future[str]] = {}
        self._stop = Event()

    def start(self, path: Path) -> None:
        """Begin with ``path``, if nobody did."""
        self._begun(path)

    def __getitem__(self, path: Path) -> str:
        """In hexadecimal; waits for it."""
        return self._begun(path).result()

    def _begun(self, path: Path) -> Future[str]:
        real, stamp = os.path.realpath(path), None
        with suppress(OSError):  # told when the hash is asked for
            stamp = stamp_of(Path(real))
        if (real, stamp) not in self._started:
            self._started[real, stamp] = self._pool.submit(_sha256, Path(real), self._stop)
        return self._started[real, stamp]

    def of(self, path: Path, stamp: Stamp) -> str:
        """The hash of the file that had ``stamp`` when it was read.

        Raises:
            SourceError: there is another by now, or none.
        """
        try:
            found = self[path]
            if stamp_of(path) != stamp:
                raise changed(path)
        except OSError as error:
            raise unreadable(path, error) from None
        return found

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
