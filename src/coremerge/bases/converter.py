"""What a converter is: the files that a base model is made of, and how they become a folder of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

EXTRA = "worlds"
"""Of this package: it brings what converters read files with."""

Write = Callable[[Sequence[Path], Path], None]
"""Called with the sources, in their order, and an empty folder to fill."""


@dataclass(frozen=True)
class Converter:
    """One kind of base model, and where it comes from.

    Attributes:
        name: as task sets name it: ``base: {converter: NAME}``.
        version: one more whenever the same files give another folder.
        write: fills a folder that ``from_pretrained`` takes. What it raises about files that it cannot read is told
            with their names by :func:`~coremerge.bases.make.make`.
        size: bytes that are written, about.
        hub_id: the public model of that architecture, which adapters name as their base.
        package: the Python package that carries the weights; it is not imported.
        requirement: what ``pip`` is given for it.
        files: the package's files that decide the result, relative to its folder: the first sources.
        parts: or other converters whose folders it is made of.
        projector: takes a file with a projector, too: the last source.
    """

    name: str
    version: int
    write: Write
    size: int
    hub_id: str
    package: str | None = None
    requirement: str | None = None
    files: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    projector: bool = False
