"""A base model's folder: its safetensors shards, its other files, and nothing outside it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coremerge.errors import SourceError, UnsupportedError
from coremerge.formats.config import read_json
from coremerge.formats.remote_files import RemoteFolder
from coremerge.formats.safetensors_file import Entry, SafetensorsFile
from coremerge.formats.source import download, local_path, parse_hub_id
from coremerge.formats.urls import is_url
from coremerge.hashing import Stamp, changed, stamp_of, unreadable

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_OTHER_WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz")
)
_OTHER_FOLDERS = frozenset(("onnx", "openvino", "original", "coreml", "gguf"))
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.md",
    "*.tiktoken",
    "LICENSE*",
]
BLOCK = 1 << 23
"""Bytes that are copied at a time."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors into a :class:`SourceError` about ``path``."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


class Shard:
    """One safetensors file, of which pieces of tensors can be read.

    Attributes:
        file: the validated file.
        entries: tensor name → dtype, shape and place.
    """

    def __init__(self, path: Path) -> None:
        self.file = SafetensorsFile(path)
        self.entries: Mapping[str, Entry] = self.file.entries
        self._descriptor = -1

    def __enter__(self) -> Shard:
        with reading(self.file.path):
            self._descriptor = os.open(self.file.path, os.O_RDONLY)
            self._start: int = 8 + struct.unpack("<Q", os.pread(self._descriptor, 8, 0))[0]
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def read(self, key: str, offset: int, size: int) -> bytearray:
        """``size`` bytes of the tensor ``key``, from ``offset`` on.

        Raises:
            SourceError: the file has changed, or cannot be read.
        """
        buffer = bytearray(size)
        view, done, at = memoryview(buffer), 0, self._start + self.entries[key].start + offset
        while done < size:
            with reading(self.file.path):
                count = os.preadv(self._descriptor, [view[done:]], at + done)
            if not count:
                break
            done += count
        with reading(self.file.path):
            same = stamp_of(self._descriptor) == self.file.stamp
        if not same or done < size:
            raise changed(self.file.path)
        return buffer

    def blocks(self, key: str) -> Iterator[tuple[int, bytearray]]:
        """The bytes of ``key`` in pieces: (offset, piece)."""
        entry = self.entries[key]
        for offset in range(0, entry.end - entry.start, BLOCK):
            yield offset, self.read(key, offset, min(BLOCK, entry.end - entry.start - offset))


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        source: as the person gave it.
        folder: where it is.
        revision: the commit on the hub, where it came from there.
        shards: file name → :class:`Shard`.
        index: what ``model.safetensors.index.json`` says; None for a single file.
        config: what ``config.json`` says; empty where there is none.
        others: the further files that make up the model, relative to the folder.
        left: files that are no part of the result, since they hold the weights before the merge.
    """

    source: str
    folder: Path
    revision: str | None
    shards: Mapping[str, Shard]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    others: tuple[Path, ...]
    left: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """All that the model is made up of."""
        return [*(self.folder / name for name in self.shards), *(self.folder / other for other in self.others)]

    @property
    def stamps(self) -> Mapping[Path, Stamp]:
        """Shard → its stamp when it was opened."""
        return {shard.file.path: shard.file.stamp for shard in self.shards.values()}

    @property
    def home(self) -> Mapping[str, str]:
        """Tensor name → file name."""
        return {key: name for name, shard in self.shards.items() for key in shard.entries}


def open_base(source: str | Path, *, cache_dir: str | Path | None = None, token: str | bool | None = None) -> BaseModel:
    """Open a base model's folder, hub id or URL; reads headers only.

    Raises:
        SourceError: nothing usable is there, or a name or link leads out of the folder.
        UnsupportedError: it has pickles only.
    """
    folder, revision = _find(source, cache_dir, token)
    names, index = _shard_names(folder)
    root = _root(folder)
    shards = {name: Shard(_inside(folder / name, root)) for name in names}
    _check_duplicates(shards, folder)
    listed = folder / "config.json"
    config = read_json(_inside(listed, root)) if listed.is_file() else {}
    others, left = _other_files(folder, root, {*names, INDEX_NAME} if index is not None else set(names))
    return BaseModel(str(source), folder, revision, shards, index, config, others, left)


def _find(source: str | Path, cache_dir: str | Path | None, token: str | bool | None) -> tuple[Path, str | None]:
    if is_url(source):
        return RemoteFolder(str(source)).fetch_all(_WANTED, _OTHER_FOLDERS), None
    path = local_path(source)
    if path and path.is_dir():
        return path, None
    hub = None if isinstance(source, Path) or path else parse_hub_id(source)
    if hub is None:
        raise SourceError("no such base model", file=source, remedy="Give its folder or its hub id")
    prefix = f"{hub.subfolder}/" if hub.subfolder else ""
    snapshot = download(hub, source, [prefix + pattern for pattern in _WANTED], cache_dir, token)
    folder = snapshot / hub.subfolder if hub.subfolder else snapshot
    if not folder.is_dir():
        raise SourceError("the repository has no such folder", file=source, key=hub.subfolder)
    return folder, snapshot.name


def _shard_names(folder: Path) -> tuple[list[str], Mapping[str, Any] | None]:
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME], None
    if (folder / INDEX_NAME).is_file():
        return _indexed(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise SourceError(
            f"several safetensors files and no {INDEX_NAME} that says how they belong together", file=folder,
            key=INDEX_NAME, remedy="Download the model again",
        )  # fmt: skip
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise UnsupportedError(
            "the base model is there only as pickles, which can run code when they are read", file=folder,
            remedy="Convert it first: load it with transformers and save_pretrained it, which writes safetensors",
        )  # fmt: skip
    adapter = (folder / "adapter_config.json").is_file()
    raise SourceError(
        "no model.safetensors here" + (": this is an adapter, not a base model" if adapter else ""), file=folder,
        remedy="Give the folder of the base model itself",
    )  # fmt: skip


def _indexed(folder: Path) -> tuple[list[str], Mapping[str, Any]]:
    path = folder / INDEX_NAME
    index = read_json(_inside(path, _root(folder)))
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise SourceError("has no weight_map of tensor names to file names", file=path, key="weight_map")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise SourceError(
                "not the name of a safetensors file in this folder", file=path, key="weight_map", value=name,
                remedy="Do not trust this model",
            )  # fmt: skip
        if not os.path.exists(folder / name):  # noqa: PTH110 - no name that the system does not take raises
            raise SourceError("this shard is missing", file=folder / name, remedy="Download the model again")
    return names, index


def _check_duplicates(shards: Mapping[str, Shard], folder: Path) -> None:
    seen: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.entries:
            if key in seen:
                remedy = "Download the model again"
                raise SourceError(f"in both {seen[key]} and {name}", file=folder, key=key, remedy=remedy)
            seen[key] = name


def _root(folder: Path) -> Path:
    """What links in ``folder`` may lead into: itself, or the repository's part of the hub's cache."""
    real = folder.resolve()
    for parent in real.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return real


def _inside(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root):
        raise _leads_out(path)
    if path.exists() and not path.is_file():
        raise SourceError("is no plain file", file=path, remedy="Remove it from the model's folder")
    return path


def _leads_out(path: Path) -> SourceError:
    return SourceError("a link that leads out of the model's folder", file=path, remedy="Put what it links to there")


def _other_files(folder: Path, root: Path, known: set[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files to copy, and files to leave out: weights in other formats would be those before the merge."""
    kept, left = [], []
    for here, folders, names in os.walk(folder):
        top = Path(here) == folder
        for name in sorted(folders):
            if name.startswith(".") or name == "__pycache__" or (top and name in _OTHER_FOLDERS):
                folders.remove(name)
                if name in _OTHER_FOLDERS:
                    left.append(Path(name))
            elif Path(here, name).is_symlink():
                raise _leads_out(Path(here, name))
        for name in sorted(names):
            path = Path(here, name)
            if top and name in known:
                continue
            if top and (path.suffix in _OTHER_WEIGHTS or name.endswith(".index.json")):
                left.append(Path(name))
            elif not name.startswith("."):
                kept.append(_inside(path, root).relative_to(folder))
    return tuple(sorted(kept)), tuple(sorted(left))


def dump_index(index: Mapping[str, Any], home: Mapping[str, str], total: int) -> str:
    """The index of the result: the base's, with ``total`` bytes of tensors at ``home``."""
    metadata = index.get("metadata")
    kept = {k: v for k, v in metadata.items() if k != "total_parameters"} if isinstance(metadata, dict) else {}
    return json.dumps({**index, "metadata": {**kept, "total_size": total}, "weight_map": dict(home)}, indent=2) + "\n"
