"""Hard links: files of a result that are an input's own, under a second name, and take no room."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import EACCES, EMLINK, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM, EXDEV
from pathlib import Path

from coremerge.formats.atomic import Resumable
from coremerge.formats.base_weights import reading
from coremerge.formats.checkpoint import shorten
from coremerge.formats.safetensors_layout import write_error, writing
from coremerge.hashing import Stamp, changed, stamp_of

_REASONS = {EXDEV: "the output is on another disk or volume", EMLINK: "one of them has as many links as it may have"}
_CANNOT = {*_REASONS, EACCES, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM}


@dataclass
class Links:
    """What became of files that were to be linked.

    Attributes:
        made: names of those that are.
        refused: names of the others → why not, in plain words.
    """

    made: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> Iterator[str]:
        """What there is to know."""
        if self.made:
            yield f"hard links to the base's own files, which share every later change: {shorten(self.made)}"
        for why in dict.fromkeys(self.refused.values()):
            yield f"copied, not linked: {shorten(name for name in self.refused if self.refused[name] == why)}: {why}"


def link_files(files: Mapping[Path, Stamp], folder: Path, resume: Resumable | None = None) -> Links:
    """Link ``files`` into ``folder`` under their names, as far as its file system does that.

    A link among ``files`` stands for the file that it leads to. What ``resume`` knows to be complete is left as it is.

    Raises:
        SourceError: a file is gone, or no longer the one that had its stamp.
        OutputError: nothing can be made there.
    """
    links = Links()
    for source, stamp in files.items():
        name, target = source.name, folder / source.name
        if resume and name in resume.files:
            links.made += [name] if target.samefile(source) else []
            continue
        why = _link(source, target, stamp)
        if why is not None:
            links.refused[name] = why
            continue
        links.made.append(name)
        if resume:
            resume.finish(name)
    return links


def _link(source: Path, target: Path, stamp: Stamp) -> str | None:
    """Why it cannot be, if so."""
    with reading(source):
        real = source.resolve(strict=True)
    with writing(target):
        target.unlink(missing_ok=True)
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise write_error(target, error) from None
        return _REASONS.get(error.errno, f"hard links are not possible there ({error.strerror})")
    if stamp_of(target) != stamp:
        raise changed(source)
    return None


def one_disk(file: Path, folder: Path) -> bool:
    """Whether a link in ``folder`` to ``file`` can be expected to work."""
    with reading(file):
        return file.stat().st_dev == folder.stat().st_dev
