"""What suits a process that does one job and ends."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h


def settle() -> None:
    """Spend memory rather than time, within bounds.

    Imports make many objects that last: to look for cycles among them every 700, and once more at the end, takes a
    quarter as long as importing torch. And memory of freed matrices is kept for the next ones: to hand it back to the
    system, and have each page given and cleared anew, took a tenth of a merge.
    """
    _open_streams()
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):  # another C library than glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(_TRIM_THRESHOLD, 512 << 20)


def _open_streams() -> None:
    """A stream that is closed (``>&-``) leads nowhere: else the next file that is opened takes its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123


def leave(status: int) -> NoReturn:
    """End now: the system takes back all memory at once, Python would object by object (a tenth of torch's import)."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
