"""A base model by its converter's name: the folder it was made into, now or before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coremerge.bases.cache import fill, is_whole, place_of
from coremerge.bases.converter import Converter
from coremerge.bases.dinov2 import DINOV2
from coremerge.bases.llava import LLAVA
from coremerge.bases.packages import check_bytes, package_files, reinstall
from coremerge.bases.smollm2 import SMOLLM2
from coremerge.bases.whisper import WHISPER
from coremerge.errors import ConfigError
from coremerge.hashing import file_sha256, unreadable

CONVERTERS: Mapping[str, Converter] = {converter.name: converter for converter in (DINOV2, LLAVA, SMOLLM2, WHISPER)}
"""Name → converter."""


def make(
    name: str, *, package: str | None = None, requirement: str | None = None, projector: str | Path | None = None
) -> Path:
    """The folder of a base model, for ``from_pretrained``; made if it is not in the cache yet.

    The cache is the folder ``bases`` in ``COREMERGE_CACHE``, or in ``coremerge`` in the user's folder for caches. It
    may be removed at any time.

    Args:
        name: one of :data:`CONVERTERS`.
        package: another package with such files than the converter's own.
        requirement: what ``pip`` is given to install it.
        projector: a file with the projector, where the converter takes one.

    Raises:
        ConfigError: no such converter, or it lacks a projector, or takes none.
        MissingExtraError: the package, or a library that reads its files, is not installed.
        SourceError: a file is missing, or damaged.
        OutputError: the folder cannot be written.

    Example:
        >>> make("dino")
        Traceback (most recent call last):
        coremerge.errors.ConfigError: converter = "dino": no such converter. Converters: dinov2, llava, smollm2, whisper
    """
    converter = CONVERTERS.get(name)
    if converter is None:
        known = f"Converters: {', '.join(CONVERTERS)}"
        raise ConfigError("no such converter", key="converter", value=name, remedy=known)
    if converter.projector != (projector is not None):
        what = "takes no projector" if projector else "needs a projector"
        raise ConfigError(
            f"{name} {what}", key="projector",
            remedy="Leave it out" if projector else "Give the file that holds it: projector: FILE, or --projector FILE",
        )  # fmt: skip
    if converter.package is None:
        return _of_parts(converter, Path(str(projector)))
    requirement = requirement or package or str(converter.requirement)
    return _of_package(converter, package or converter.package, requirement)


def _of_package(converter: Converter, package: str, requirement: str) -> Path:
    files = package_files(package, requirement, converter.files)
    hashes = [_sha256(file) for file in files]  # 0.2 s for 100 MB
    place = place_of(converter, hashes)
    if not is_whole(place):
        for file, sha256 in zip(files, hashes, strict=True):
            check_bytes(file, sha256, requirement)
        fill(converter, files, place, reinstall(requirement))
    return place


def _of_parts(converter: Converter, projector: Path) -> Path:
    folders = [make(part) for part in converter.parts]
    place = place_of(converter, [*(folder.name for folder in folders), _sha256(projector)])
    if not is_whole(place):
        fill(converter, [*folders, projector], place, "Give the projector that was trained between these bases")
    return place


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise unreadable(path, error) from None
