"""An adapter's tensors in several files: ``NAME-00001-of-00002.safetensors`` and so on, with an index or without.

Source: ``transformers``' ``save_pretrained``, which splits what is larger than ``max_shard_size``, adapters too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coremerge.errors import SourceError, TensorError
from coremerge.formats.config import read_json
from coremerge.formats.safetensors_file import Entry, PickledFile, SafetensorsFile, Tensors

INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_MOST = 10_000  # shards: the largest models have some two hundred


class Folder(Protocol):
    """A folder here or behind a URL."""

    url: str

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""

    def fetch(self, *names: str) -> list[Path]:
        """Those files, on this machine."""


class Here:
    """A folder on this machine.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.path / name).is_file()

    def fetch(self, *names: str) -> list[Path]:
        """Those files."""
        return [self.path / name for name in names]


def is_part(name: str) -> bool:
    """Whether ``name`` is an index, or one shard of several.

    Example:
        >>> [is_part(f"x{end}.safetensors") for end in ("", "-00001-of-00002", "-00001-of-00001")]
        [False, True, False]
    """
    return name.endswith(INDEX) or _count(_SHARD.fullmatch(name)) > 1


def whole(folder: Folder, name: str) -> tuple[list[str], Mapping[str, str]]:
    """All files that ``name``, an index or a shard, is one of; and tensor name → file, where an index says it.

    Raises:
        SourceError: a shard is missing, or an index that says nothing of use.
    """
    found = _SHARD.fullmatch(name)
    index = name if name.endswith(INDEX) else f"{found['stem']}{found['suffix']}{INDEX}" if found else ""
    if folder.has(index):
        table = _table(folder, index)
        names = sorted(set(table.values()))
        if name not in (index, *names):
            raise SourceError(
                f"not one of the shards that {index} lists",
                file=f"{folder.url}/{name}",
                remedy=f"Name {index}, or none",
            )
    else:
        table, names = {}, _counted(found, folder)
    missing = [other for other in names if not folder.has(other)]
    if missing:
        raise SourceError(
            f"one of {len(names)} shards: {missing[0]} is not beside it", file=f"{folder.url}/{name}", key=missing[0],
            remedy="Put all shards into one folder; half an adapter is none",
        )  # fmt: skip
    return names, table


def _count(found: re.Match[str] | None) -> int:
    return min(int(found["count"]), _MOST) if found else 0


def _counted(found: re.Match[str] | None, folder: Folder) -> list[str]:
    """The shards by their numbers; a few writers begin with 0."""
    if found is None:
        return []

    def named(number: int) -> str:
        return f"{found['stem']}-{number:0{len(found['number'])}d}-of-{found['count']}{found['suffix']}"

    first = 0 if folder.has(named(0)) else 1
    return [named(number) for number in range(first, first + _count(found))]


def _table(folder: Folder, index: str) -> Mapping[str, str]:
    (path,) = folder.fetch(index)
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise SourceError(
            "has no weight_map of tensor names to file names", file=path, key="weight_map",
            remedy="Save the adapter again",
        )  # fmt: skip
    for name in set(table.values()):
        if not re.fullmatch(r"[^\\/\x00-\x1f]+\.(safetensors|bin|pt|pth)", name):
            raise SourceError(
                "not the name of a file of tensors in this folder", file=path, key="weight_map", value=name,
                remedy="Do not trust this adapter",
            )  # fmt: skip
    return table


class ShardedFile:
    """Several files of tensors that are one adapter.

    Args:
        paths: of the files.
        table: tensor name → file name, as an index says it; empty: there is none.

    Attributes:
        path: for messages: the folder's files in one name.

    Raises:
        TensorError: a tensor that is in two of them, or not where the index says.
    """

    def __init__(self, paths: Sequence[Path], table: Mapping[str, str]) -> None:
        found = _SHARD.fullmatch(paths[0].name)
        self.path = paths[0].with_name(f"{found['stem']}-*{found['suffix']}") if found else paths[0]
        self._home: dict[str, Tensors] = {}
        for path in paths:
            shard = open_one(path)
            for key in shard.entries:
                if key in self._home:
                    other = self._home[key].path.name
                    raise TensorError(f"is in {other}, too", file=path, key=key, remedy="Save the adapter again")
                self._home[key] = shard
        lost = next((key for key, name in table.items() if self._place(key) != name), None)
        if lost is not None:
            said, real = table[lost], self._place(lost)
            what = f"the index says {said}, and it is in {real or 'none of the shards'}"
            raise TensorError(what, file=self.path, key=lost, remedy="Save the adapter again")

    def _place(self, key: str) -> str:
        return self._home[key].path.name if key in self._home else ""

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name → dtype and shape."""
        return {key: shard.entries[key] for key, shard in self._home.items()}

    def read(self, key: str) -> Tensor:
        """The tensor ``key``, as stored."""
        return self._home[key].read(key)


def open_one(path: Path) -> Tensors:
    """A file of tensors, by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
