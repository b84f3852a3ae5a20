"""A merge that may be stopped at any moment and gone on with: ``.OUT.resume`` beside the folder OUT that is wanted.

It holds a journal (merged cores, and the files that are whole) and ``out``, which becomes OUT.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coremerge.formats.atomic import real_place
from coremerge.formats.journal import Journal
from coremerge.held import Held


class Unfinished:
    """What is done of a merge into ``out``, and where what is done next is kept.

    Args:
        out: the folder that is wanted.
        about: all that the result depends on; see :func:`mark_of`.

    Attributes:
        place: the folder that becomes ``out``.
        held: the modules that are merged.
        files: names in ``place`` that are complete.

    Raises:
        ConfigError: what is there was begun with something else.
        OutputError: it cannot be written, or another process is at work on it.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        out = real_place(out)
        self.folder = folder_of(out)
        self.place = self.folder / "out"
        self.files: set[str] = set()
        self._journal = Journal(self.folder / "journal", mark_of(about))
        self.held = Held(self._journal)
        try:
            for part in self._journal.parts:
                if "file" in part.facts:
                    self.files.add(part.facts["file"])
                else:
                    self.held.take(part)
        except BaseException:
            self._journal.close()
            raise
        self.files = {name for name in self.files if (self.place / name).is_file()}
        if not self.files:  # also of another merge, whose journal is gone
            shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is None:  # while nobody else can take hold of it
            shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.close()
        if error is not None:
            error.kept_in = self.folder  # type: ignore[attr-defined]  # for whoever tells the person

    def finish(self, name: str) -> None:
        """A file in :attr:`place` that is complete and on the disk."""
        self.files.add(name)
        self._journal.add({"file": name}, {})


def tidy(out: Path) -> None:
    """Remove what a merge into ``out`` left that was killed in its last moment, when ``out`` was in its place."""
    folder = folder_of(real_place(out))
    if (folder / "journal").is_file() and not (folder / "out").exists() and out.exists():
        shutil.rmtree(folder, ignore_errors=True)


def folder_of(out: Path) -> Path:
    """Where a merge into ``out`` keeps what is done."""
    return out.parent / f".{out.name}.resume"


def mark_of(about: Mapping[str, Any]) -> str:
    """A hash of plain facts."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
