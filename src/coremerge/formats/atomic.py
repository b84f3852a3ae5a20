"""Directories, and files, that are either complete or absent.

:func:`atomic_directory` gives a hidden sibling of the wanted directory to write into. Only when the block ends without
an error is everything brought to disk and the sibling renamed into place, which a file system does in one step. On any
error, Ctrl-C included, the sibling is removed and the wanted directory is as it was: absent, or the old one. A process
that is killed cannot clean up; what it leaves behind is hidden (``.NAME.…partial``, and ``.NAME.….old``, which is the
old directory) and never mistaken for a result.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOENT, ENOTEMPTY
from pathlib import Path
from typing import Protocol

from coremerge.errors import OutputError
from coremerge.formats.safetensors_layout import Layout, TensorFile, write_error, writing

HIDDEN = len("..12345678.partial")
"""Bytes that the hidden name of what is not whole yet is longer than the result's."""

WITHIN = HIDDEN + 64
"""Bytes that paths in it are longer than its own: names of files are short."""


class Resumable(Protocol):
    """Where an unfinished directory is, and which of its files are complete: see :mod:`coremerge.unfinished`."""

    place: Path
    files: set[str]

    def finish(self, name: str) -> None:
        """One more file is complete, and on the disk."""


@contextmanager
def atomic_directory(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    needed: int = 0,
    resume: Resumable | None = None,
) -> Iterator[Path]:
    """A directory to write into, which becomes ``path`` when the block ends well.

    Args:
        path: what is wanted; missing parents are made. An empty directory is replaced.
        overwrite: replace a directory of weights that is there already.
        inputs: files or folders that are read; a directory that holds one of them is not replaced.
        needed: bytes that will be written, to find a full disk before the work is done.
        resume: write into its place, and leave what is there on an error; files that are complete stay as they are.

    Raises:
        OutputError: ``path`` is in use, cannot be made, or the disk is too small. One that the block raises about a
            file in the sibling is raised anew about that file in ``path``.
    """
    inputs = list(inputs)
    out = check_output(path, overwrite=overwrite, inputs=inputs)
    made = _make_parents(out)
    partial = resume.place if resume else out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        with writing(out):
            partial.mkdir(exist_ok=resume is not None)
            _check_space(out, needed - _held(partial))
        try:
            yield partial
        except OutputError as error:
            raise _as_wanted(error, partial, Path(path)) from None
        with writing(out):
            _sync(partial)
        check_output(path, overwrite=overwrite, inputs=inputs)
        with writing(out):
            _swap(partial, out, overwrite)
    except BaseException:
        if resume is None:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        raise


def _held(folder: Path) -> int:
    """Bytes on the disk of the files in it: they are made at full length, and have holes until they are filled.

    What has a second name elsewhere takes no room of its own.
    """
    found = [file.stat() for file in folder.rglob("*") if file.is_file()]
    own = [one for one in found if one.st_nlink == 1]
    return sum(min(one.st_size, 512 * getattr(one, "st_blocks", one.st_size)) for one in own)


def check_output(path: str | Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """``path`` made absolute, once it is known that it may be written; touches nothing.

    Raises:
        OutputError: see :func:`atomic_directory`.
    """
    out = real_place(path)
    for held in inputs:
        real = Path(os.path.realpath(held))
        if out in (real, *real.parents, *Path(held).absolute().parents):
            raise OutputError("holds an input", file=path, key=str(held), remedy="Choose another output folder")
    try:
        if out.is_symlink():
            raise OutputError("a link that leads to itself", file=path, remedy="Remove it, or choose another folder")
        if out.exists() and not out.is_dir():
            raise OutputError("is a file", file=path, remedy="Choose another output folder")
        entries = list(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise write_error(Path(path), error) from None
    if out in (Path.cwd(), *Path.cwd().parents):
        raise OutputError("the current folder or one above it cannot be replaced", file=path, remedy="Name a new one")
    if out.is_mount():
        raise OutputError("is where a disk is mounted and cannot be replaced", file=path, remedy="Name a folder in it")
    if entries and not overwrite:
        raise OutputError("exists and is not empty", file=path, remedy="Choose another folder, or pass --overwrite")
    if entries and not any(entry.suffix == ".safetensors" for entry in entries):
        raise OutputError(
            "holds no weights, so it is not a former result and is not replaced", file=path,
            remedy="Choose another folder, or remove this one yourself",
        )  # fmt: skip
    if entries and not os.access(out, os.W_OK):
        raise write_error(Path(path), PermissionError())
    return out


def real_place(path: str | Path) -> Path:
    """``path`` made absolute, links followed.

    Raises:
        OutputError: it names no place, or one whose name is longer than the disk takes.
    """
    try:
        place = Path(os.path.realpath(Path(path).expanduser()))
    except (RuntimeError, ValueError) as error:  # ~ of a user that does not exist; a null byte
        raise OutputError(f"names no place: {error}", file=path, remedy="Choose another output folder") from None
    above = next((parent for parent in place.parents if _is_folder(parent)), place)
    most = _longest(above, "PC_NAME_MAX", 255)
    for part, room in ((place.name, most - HIDDEN), *((part, most) for part in place.parts[:-1])):
        if len(os.fsencode(part)) > room:
            raise OutputError(
                f"a name of {len(os.fsencode(part))} bytes, and the disk takes {room} there", file=_shortened(place),
                remedy="Choose a shorter name",
            )  # fmt: skip
    whole, room = len(os.fsencode(place)), _longest(above, "PC_PATH_MAX", 4096) - WITHIN
    if whole > room:
        raise OutputError(
            f"a path of {whole} bytes, and the system takes {room} for a result", file=_shortened(place),
            remedy="Choose a shorter one",
        )  # fmt: skip
    return place


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # its name is too long
        return False


def _longest(folder: Path, name: str, usual: int) -> int:
    try:
        return os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):  # Windows; a file system that does not say
        return usual


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) < 100 else f"{text[:48]}...{text[-48:]}"


def _as_wanted(error: OutputError, partial: Path, path: Path) -> OutputError:
    """``error`` about a file in ``partial``, as one about that file in ``path``."""
    if error.file is None or not Path(error.file).is_relative_to(partial):
        return error
    wanted = path / Path(error.file).relative_to(partial)
    return OutputError(error.what, file=wanted, key=error.key, remedy=error.remedy)


def check_file(path: str | Path, *, overwrite: bool = False) -> Path:
    """``path`` made absolute, once it is known that :func:`write_file` may write it; touches nothing.

    Raises:
        OutputError: it is there already, or a folder.
    """
    out = real_place(path)
    if out.is_dir():
        raise OutputError("is a folder", file=path, remedy="Name a file")
    if out.exists() and not overwrite:
        raise OutputError("exists", file=path, remedy="Choose another file, or pass --overwrite")
    return out


def write_file(path: str | Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """A file, complete or not at all; missing folders are made.

    Raises:
        OutputError: see :func:`check_file`; or it cannot be written.
    """
    out = check_file(path, overwrite=overwrite)
    made = _make_parents(out)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(Path(path)):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            _sync_one(partial)
            partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def tensor_file(
    folder: Path, name: str, layout: Layout, resume: Resumable | None = None
) -> Iterator[TensorFile | None]:
    """The file ``name`` in ``folder``, to be filled; None if an earlier run completed it."""
    if resume and name in resume.files:
        yield None
        return
    if resume:
        with writing(folder / name):
            (folder / name).unlink(missing_ok=True)
    with TensorFile(folder / name, layout) as file:
        yield file
    if resume:
        resume.finish(name)


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write small files into ``folder``, under plain names."""
    for name, content in files.items():
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"not a plain file name: {name!r}")
        with writing(folder / name):
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def standing(out: str | Path) -> Path:
    """The innermost folder above ``out`` that is there."""
    return next(parent for parent in real_place(out).parents if parent.is_dir())


def _make_parents(out: Path) -> list[Path]:
    """Make the directories above ``out``; those that were missing, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OutputError(
            f"needs {_size(needed)}, and the disk has {_size(free)} left", file=out,
            remedy="Free some space, or write elsewhere",
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.2f} MB"


def _sync(folder: Path) -> None:
    """Bring all that is in ``folder`` to the disk."""
    for here, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(here, name))
        with suppress(OSError):  # some file systems cannot sync a folder
            _sync_one(Path(here))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename ``partial`` to ``out``; an old ``out`` goes only when the new one is in its place.

    An empty folder is replaced by the renaming itself. So without ``overwrite`` nothing that another process puts there
    at the last moment is moved away.
    """
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    try:
        if overwrite and out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException as error:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)  # out is there, and another process's
        if isinstance(error, OSError) and error.errno in (EEXIST, ENOTEMPTY, ENOENT) and out.exists():
            raise OutputError(
                "another process wrote it just now", file=out, remedy="Let one finish before the other begins"
            ) from None
        raise
    with suppress(OSError):
        _sync_one(out.parent)
    shutil.rmtree(old, ignore_errors=True)
