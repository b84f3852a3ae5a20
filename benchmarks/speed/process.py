"""Whole processes, measured: wall time, processor time, peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What one process took: seconds of wall clock and of processor time, and bytes of peak resident memory."""

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str | Path]) -> Usage:
    """Run ``command`` to its end.

    Raises:
        RuntimeError: it failed; with its stderr.
    """
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {errors.decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


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
