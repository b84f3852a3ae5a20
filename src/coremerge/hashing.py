"""SHA-256 of files, worked out beside other work; imports nothing heavy, so that it can begin while torch is loaded."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

_BLOCK = 4 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return _sha256(path, Event())


def _sha256(path: Path, stop: Event) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(block)) and not stop.is_set():
            digest.update(block[:count])
    return digest.hexdigest()


class Hashes:
    """The SHA-256 of each file that was started, by one thread, each file once.

    Example:
        >>> with Hashes() as hashes:
        ...     hashes.start(Path(os.devnull))
        ...     hashes[Path(os.devnull)][:8]
        'e3b0c442'
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._started: dict[str, Future[str]] = {}
        self._stop = Event()

    def start(self, path: Path) -> None:
        """Begin with ``path``, if nobody did."""
        real = os.path.realpath(path)
        if real not in self._started:
            self._started[real] = self._pool.submit(_sha256, Path(real), self._stop)

    def __getitem__(self, path: Path) -> str:
        """In hexadecimal; waits for it."""
        self.start(path)
        return self._started[os.path.realpath(path)].result()

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
