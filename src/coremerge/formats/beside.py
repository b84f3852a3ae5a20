"""Files beside an adapter's own: found when it is read, copied when it is written."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from coremerge.carried import kind_of
from coremerge.formats.config import CONFIG_NAME, LFS_MARK
from coremerge.formats.foreign import holds_factors
from coremerge.formats.safetensors_layout import writing
from coremerge.hashing import Stamp, changed, stamp_of, unreadable

STANDARD = ("adapter_model.", "adapter_model-")
LARGEST = 4 << 30
"""Bytes of weights that are carried over: heads and tables of embeddings have up to two gigabytes, models more."""
KNOWN = (
    "value_head.safetensors", "value_head.bin", "v_head.safetensors", "v_head.bin", "non_lora_trainables.bin",
    "non_lora_state_dict.bin", "new_embeddings.safetensors", "mm_projector.bin",
)  # fmt: skip
"""Trained weights that are asked for where files cannot be listed."""
_MODEL = ("model*.safetensors", "pytorch_model*.bin", "consolidated*")


def wanted(names: Collection[str], read: Collection[str]) -> tuple[list[str], list[str]]:
    """Of the ``names`` in an adapter's folder those to be carried over, and what is said of weights that are not.

    Args:
        names: all files there.
        read: those that the adapter is read from.
    """
    found = [name for name in sorted(names) if name not in read and kind_of(name) is not None]
    kept = {name: _why_left(name, names, read) if kind_of(name) == "weights" else None for name in found}
    left: dict[str, list[str]] = {}
    for name, why in kept.items():
        if why:
            left.setdefault(why, []).append(name)
    return [name for name, why in kept.items() if not why], [f"{', '.join(n)} beside it: {w}" for w, n in left.items()]


def _why_left(name: str, names: Collection[str], read: Collection[str]) -> str | None:
    if name in KNOWN:
        return None
    if name.startswith(STANDARD) or not any(one.startswith(STANDARD) for one in read):
        return "another adapter, or the same once more; left unread"
    if "config.json" in names and any(fnmatch(name, pattern) for pattern in _MODEL):
        return "weights of a whole model; left unread"
    return None


def below(folder: Path) -> list[str]:
    """What is said of weights and templates in folders of ``folder``: they are not carried over.

    Folders that hold adapters of their own (checkpoints) are not spoken of.
    """
    said = []
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in (path for path in inner if not (path / CONFIG_NAME).exists()):
            held = sorted(file.name for file in path.iterdir() if file.suffix == ".jinja" or _is_weights(file))
            more = f" and {len(held) - 3} more" if len(held) > 3 else ""
            said += [f"{path.name}/ beside it ({', '.join(held[:3])}{more}): left unread"] if held else []
    except OSError:  # a folder that may not be listed
        pass
    return said


def _is_weights(file: Path) -> bool:
    return kind_of(file.name) == "weights" and file.is_file()


def usable(files: Mapping[str, Path]) -> tuple[dict[str, Path], list[str], list[str]]:
    """Those that can be carried over; what is said, and what is warned of, of the others."""
    kept, notes, warnings = {}, [], []
    for name, file in files.items():
        if what := _broken(file):
            warnings.append(f"{name} beside it is not carried over: {what}")
        elif file.suffix == ".safetensors" and holds_factors(file):
            notes.append(f"{name} beside it: another adapter; left unread")
        else:
            kept[name] = file
    return kept, notes, warnings


def _broken(file: Path) -> str | None:
    try:
        with file.open("rb") as data:
            head = data.read(len(LFS_MARK))
        size = file.stat().st_size
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    if head == LFS_MARK:
        return "it is a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    return f"it has {size / 1e9:.1f} GB, more than a head or a table has" if size > LARGEST else None


def write_carried(
    folder: Path, carried: Mapping[str, Path], stamps: Mapping[Path, Stamp], without: Collection[str] = ()
) -> None:
    """Copy files into ``folder``.

    Args:
        folder: that is written.
        carried: name → what it is copied from.
        stamps: of the sources, from when they were found.
        without: names that are left out.

    Raises:
        SourceError: a source has changed since, or is gone.
    """
    for name, source in carried.items():
        if name not in without:
            _copy(source, folder / name)
            _check(source, stamps)


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.open("rb")
    except OSError as error:
        raise unreadable(source, error) from None
    with data, writing(target), target.open("wb") as file:
        shutil.copyfileobj(data, file, 1 << 23)


def _check(source: Path, stamps: Mapping[Path, Stamp]) -> None:
    try:
        same = source not in stamps or stamp_of(source) == stamps[source]
    except OSError as error:
        raise unreadable(source, error) from None
    if not same:
        raise changed(source)
