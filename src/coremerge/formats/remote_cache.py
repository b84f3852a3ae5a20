"""Where files that were fetched are kept: a folder of this user, which may be removed at any time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coremerge.errors import OutputError

STALE = 86_400.0
"""Seconds after which nobody is at work any more on what was half fetched."""


SET = "Set COREMERGE_CACHE to a folder"


def cache() -> Path:
    """``COREMERGE_CACHE``, or ``coremerge`` in the user's folder for caches.

    Raises:
        OutputError: that is no place.
    """
    given = os.environ.get("COREMERGE_CACHE")
    common = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = Path(given or Path(common, "coremerge"))
    try:
        return place.expanduser().absolute()
    except RuntimeError as error:  # ~somebody who is not known
        raise OutputError(f"no folder for the cache: {error}", file=place, remedy=SET) from None


def safe(name: str) -> str:
    """``name`` as one part of a path that leads nowhere else.

    Example:
        >>> safe("../a b/x.bin"), safe("")
        ('_a_b_x.bin', 'file')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-60:].lstrip(".") or "file"


def hash_of(*of: object) -> str:
    """A name for plain data."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def partial_file() -> Iterator[Path]:
    """A name for a file that is being fetched; those that killed processes left are removed."""
    for left in cache().glob(".*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    partial = cache() / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Wait for another process on this machine that fetches the same; where there are no locks, both do."""
    locks = cache() / "locks"
    cache().mkdir(mode=0o700, parents=True, exist_ok=True)
    locks.mkdir(exist_ok=True)
    with (locks / hash_of(str(place))).open("wb") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
