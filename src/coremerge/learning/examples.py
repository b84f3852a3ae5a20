"""Unlabelled inputs from where people have them: JSON lines, texts, folders of images, data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coremerge.errors import ConfigError, SourceError
from coremerge.formats.source import local_path, parse_hub_id
from coremerge.learning.data_sets import is_saved, on_disk, on_hub
from coremerge.learning.rows import GIVE, SOURCES, Example, one_kind, parse_row

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def read_examples(source: str | Path | Sequence[Example], *, count: int = 64, seed: int = 0) -> list[Example]:
    """At most ``count`` inputs, drawn without replacement, in the order of the source.

    Labels, and any keys or columns but ``text``, ``pair`` (or ``text_pair``), ``messages``, ``image`` and ``audio``,
    are not read.
    Inputs whose text is blank are passed over, like blank lines. Images and sounds are not opened here.

    Args:
        source: JSON lines (``.jsonl``, ``.json``), where an image or a sound is a path relative to the file's
            folder; a text file
            (``.txt``), one input a line; a folder of images, with all folders in it; a data set saved on disk; or one
            of the hub: ``org/name``, ``org/name:split``, ``org/name@revision:split``; or inputs that were read.
        count: all are taken if there are fewer.
        seed: of the draw.

    Raises:
        SourceError: it is not there, cannot be read, or holds no input.
        ConfigError: a line or row is no input, or is of another kind than the first.
        MissingExtraError: datasets is not installed.
    """
    if count < 1:
        raise ConfigError("at least one input is needed", key="count", value=count)
    drawn = _draw(_rows(source), count, seed)
    if not drawn:
        raise SourceError("holds no input", file=source if isinstance(source, (str, Path)) else None, remedy=SOURCES)
    one_kind(drawn)
    for example in drawn:
        check_files(example)
    return drawn


def check_files(example: Example) -> None:
    """Refuse an input whose image or sound is not there.

    Raises:
        SourceError: see above.
    """
    for key, what in (("image", "image"), ("audio", "sound")):
        path = getattr(example, key)
        if isinstance(path, Path) and not _is_file(path):
            raise SourceError(
                f"no such {what}", file=example.place, key=key, value=str(path),
                remedy="Paths are relative to the folder of the file that names them",
            )  # fmt: skip


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _draw(rows: Sequence[Example | None], count: int, seed: int) -> list[Example]:
    """Rows are looked at one by one, as data sets are too large to be read whole."""
    drawn: dict[int, Example] = {}
    for index in map(int, np.random.default_rng(seed).permutation(len(rows))):
        example = rows[index]
        if example is not None:
            drawn[index] = example
        if len(drawn) == count:
            break
    return [drawn[index] for index in sorted(drawn)]


def _rows(source: str | Path | Sequence[Example]) -> Sequence[Example | None]:
    if not isinstance(source, (str, Path)):
        return source
    path = local_path(source)
    if path is None:
        hub = None if isinstance(source, Path) else parse_hub_id(source)
        if hub is None or Path(hub.repo).suffix.lower() in {*_READERS, *IMAGES}:
            raise SourceError("no such file or folder", file=source, remedy=SOURCES)
        return on_hub(hub, str(source))
    if path.is_dir():
        return on_disk(path) if is_saved(path) else _images(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SourceError("not a file that inputs are read from", file=path, remedy=SOURCES)
    return reader(path)


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"is no UTF-8 text: {error}", file=path, remedy="Save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines() also takes for an end of line
        if line.strip():
            yield line.strip(), f"{path}, line {number}"


def _text_lines(path: Path) -> list[Example]:
    return [Example(line, place=place) for line, place in numbered_lines(path)]


def _json_lines(path: Path) -> list[Example]:
    rows = (parse_row(_parsed(line, place), place, path.parent) for line, place in numbered_lines(path))
    examples = [example for example in rows if example is not None]
    if examples:
        one_kind(examples)
    return examples


def _parsed(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no JSON: {error}", file=place, value=line, remedy=f"One object a line. {GIVE}") from None
    if not isinstance(row, dict):
        raise ConfigError("no JSON object", file=place, value=row, remedy=f"One object a line. {GIVE}")
    return row


_READERS: Mapping[str, Callable[[Path], list[Example]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".txt": _text_lines,
}


def _images(folder: Path) -> list[Example]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not files:
        others = sorted(path for path in folder.iterdir() if path.suffix.lower() in _READERS)
        remedy = f"Name the file: {others[0]}" if others else SOURCES
        raise SourceError("no images in this folder, and it is no saved data set", file=folder, remedy=remedy)
    return [Example(image=path, place=str(path)) for path in files]
