"""Whole processes, measured: wall time, processor time, peak memory."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL = 0.005
"""Seconds between two looks at a process."""


@dataclass(frozen=True)
class Usage:
    """What one process took: seconds of wall clock and of processor time, and bytes of peak resident memory."""

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str | Path]) -> Usage:
    """Run ``command`` to its end.

    The peak is read while it runs where Linux tells it, as what it tells afterwards is at least this process's own.

    Raises:
        RuntimeError: it failed; with its stderr.
    """
    start, peak, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=errors)
        while not done:
            peak = max(peak, _peak_now(process.pid))
            time.sleep(POLL)
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(map(str, command))}: {errors.read().decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(wall, usage.ru_utime + usage.ru_stime, peak or usage.ru_maxrss * unit)


def _peak_now(pid: int) -> int:
    """Bytes; 0 where it cannot be told, or has ended."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def alternate(
    commands: Mapping[str, Sequence[str | Path]], repeats: int, before: Callable[[], None]
) -> dict[str, list[Usage]]:
    """Each command ``repeats`` times by turns, after one of each that does not count; ``before`` runs before each."""
    taken: dict[str, list[Usage]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            before()
            usage = measure(command)
            if turn:
                taken[name].append(usage)
    return taken


def median(usages: Sequence[Usage]) -> Usage:
    """The median of each number."""
    return Usage(
        statistics.median(u.wall for u in usages),
        statistics.median(u.cpu for u in usages),
        int(statistics.median(u.peak for u in usages)),
    )
