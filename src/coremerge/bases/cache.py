"""Where converted bases are kept, and that each is made once: whole or not at all, by one process at a time."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from coremerge.bases.converter import Converter
from coremerge.errors import CoremergeError, OutputError, SourceError
from coremerge.formats.atomic import atomic_directory
from coremerge.formats.remote_cache import SET, STALE, alone, cache, hash_of
from coremerge.formats.safetensors_layout import write_error
from coremerge.learning.optional import first_line


def place_of(converter: Converter, hashes: Sequence[str]) -> Path:
    """The folder of what a converter makes of sources with these hashes.

    Another version of the converter, or the next great version of ``transformers``, whose files others cannot all
    read, has another one.
    """
    key = hash_of(converter.name, converter.version, _written_by(), *hashes)
    return cache() / "bases" / f"{converter.name}-{key[:16]}"


FILES = ".files"
"""In each folder: the names of the others, as who makes room may remove some."""


def is_whole(place: Path) -> bool:
    """Whether a base is there, with all of its files."""
    try:
        names = (place / FILES).read_text(encoding="utf-8").split("\n")
    except OSError:
        return False
    return all((place / name).is_file() for name in names)


def fill(converter: Converter, sources: Sequence[Path], place: Path, remedy: str) -> None:
    """Make ``place``, unless another process does so in the meantime.

    Args:
        converter: what makes it.
        sources: of what.
        place: see :func:`place_of`.
        remedy: of sources that cannot be read.

    Raises:
        SourceError: they cannot; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(alone(place))
        except OSError as error:
            raise OutputError(f"no folder for the cache: {error.strerror}", file=cache(), remedy=SET) from None
        if is_whole(place):
            return
        _tidy(place)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        print(f"Making the base model {converter.name} in {place}, once", file=sys.stderr)
        try:
            with atomic_directory(place, needed=converter.size) as partial:
                _write(converter, sources, partial, remedy)
                names = sorted(file.name for file in partial.iterdir())
                (partial / FILES).write_text("\n".join(names), encoding="utf-8")
        except OutputError:
            if not is_whole(place):  # where there are no locks, another process may have been first
                raise


def _write(converter: Converter, sources: Sequence[Path], folder: Path, remedy: str) -> None:
    try:
        converter.write(sources, folder)
    except (CoremergeError, MemoryError):
        raise
    except OSError as error:
        raise write_error(folder, error) from None
    except Exception as error:  # a parser may raise anything about bytes that are not its format
        wrong = f"cannot be converted by {converter.name}: {first_line(error)}"
        raise SourceError(wrong, file=sources[0], remedy=remedy) from error


def _tidy(place: Path) -> None:
    """Remove what killed processes left."""
    for left in place.parent.glob(f".{place.name}.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)


def _written_by() -> str:
    try:
        return version("transformers").split(".")[0]
    except PackageNotFoundError:  # not installed: told when it is needed
        return ""
