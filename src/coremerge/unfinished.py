"""A merge that may be stopped at any moment and gone on with: ``.OUT.resume`` beside the folder OUT that is wanted.

It holds a journal (merged cores, and the files that are whole) and ``out``, which becomes OUT.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from coremerge.formats.journal import Journal, Part
from coremerge.merging import ModuleReport, Solved
from coremerge.spaces import Combination


class Unfinished:
    """What is done of a merge into ``out``, and where what is done next is kept.

    Args:
        out: the folder that is wanted.
        about: all that the result depends on; see :func:`mark_of`.

    Attributes:
        place: the folder that becomes ``out``.
        solved: module name → what was merged already.
        files: names in ``place`` that are complete.

    Raises:
        ConfigError: what is there was begun with something else.
        OutputError: it cannot be written, or another process is at work on it.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        out = Path(os.path.realpath(out.expanduser()))
        self.folder = folder_of(out)
        self.place = self.folder / "out"
        self.solved: dict[str, Solved] = {}
        self.files: set[str] = set()
        self._journal = Journal(self.folder / "journal", mark_of(about))
        for part in self._journal.parts:
            self._take(part)
        self.files = {name for name in self.files if (self.place / name).is_file()}
        if not self.files:  # also of another merge, whose journal is gone
            shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._journal.close()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, solved: Mapping[str, Solved]) -> None:
        """Modules that were merged."""
        facts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, one in solved.items():
            facts[name] = {
                "report": vars(one.report) | {"ranks": dict(one.report.ranks)},
                "amplification": one.amplification,
                "of": [one.combination.of_left, one.combination.of_right],
            }
            tensors |= {f"left.{name}": one.combination.left, f"right.{name}": one.combination.right}
        self._journal.add({"solved": facts}, tensors)

    def finish(self, name: str) -> None:
        """A file in :attr:`place` that is complete and on the disk."""
        self.files.add(name)
        self._journal.add({"file": name}, {})

    def _take(self, part: Part) -> None:
        if "file" in part.facts:
            self.files.add(part.facts["file"])
        for name, held in part.facts.get("solved", {}).items():
            left, right = part.tensors[f"left.{name}"], part.tensors[f"right.{name}"]
            report = ModuleReport(**held["report"] | {"shape": tuple(held["report"]["shape"])})
            self.solved[name] = Solved(Combination(left, right, *held["of"]), held["amplification"], report)


def folder_of(out: Path) -> Path:
    """Where a merge into ``out`` keeps what is done."""
    return out.parent / f".{out.name}.resume"


def mark_of(about: Mapping[str, Any]) -> str:
    """A hash of plain facts."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """File → its size and time of change: for files that are too large to be hashed."""
    found = {file: file.stat() for file in files}
    return {str(file): [stat.st_size, stat.st_mtime_ns] for file, stat in found.items()}
