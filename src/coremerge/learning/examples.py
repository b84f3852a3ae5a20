"""Unlabelled inputs from where people have them: JSON lines, texts, folders of images, data sets."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coremerge.errors import ConfigError, InputError, MissingExtraError, SourceError
from coremerge.formats.source import local_path, parse_hub_id

KINDS = ("text", "text and pair", "messages", "image", "text and image")
"""What an input can consist of; one kind for all inputs of a task."""

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SPLITS = ("validation", "test", "train")
"""Of a data set: the first of these that it has is taken where none is named."""

_KEYS = ("text", "pair", "text_pair", "messages", "image")
_GIVE = 'Give {"text": ...}, {"text": ..., "pair": ...}, {"messages": [...]}, {"image": PATH} or text and image'
_SOURCES = "Give a .jsonl or .txt file, a folder of images, a saved data set, or one of the hub: org/name[@revision]"


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One input.

    Attributes:
        text: if it has one.
        pair: a second text, that goes in together with the first.
        messages: a chat.
        image: a file, or its bytes.
        place: where it is from, for error messages.
    """

    text: str | None = None
    pair: str | None = None
    messages: tuple[Message, ...] | None = None
    image: Path | bytes | None = field(default=None, repr=False)
    place: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`, if it is well-formed."""
        return " and ".join(key for key in ("text", "pair", "messages", "image") if getattr(self, key) is not None)


def read_examples(source: str | Path, *, count: int = 64, seed: int = 0) -> list[Example]:
    """At most ``count`` inputs, drawn without replacement, in the order of the source.

    Labels, and any keys or columns but ``text``, ``pair`` (or ``text_pair``), ``messages`` and ``image``, are not read.
    Inputs whose text is blank are passed over, like blank lines. Images are not opened here.

    Args:
        source: JSON lines (``.jsonl``, ``.json``), where an image is a path relative to the file's folder; a text file
            (``.txt``), one input a line; a folder of images, with all folders in it; a data set saved on disk; or one
            of the hub: ``org/name``, ``org/name:split``, ``org/name@revision:split``.
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
        raise SourceError("holds no input", file=source, remedy=_SOURCES)
    one_kind(drawn)
    for example in drawn:
        if isinstance(example.image, Path) and not example.image.is_file():
            raise SourceError(
                "no such image", file=example.place, key="image", value=str(example.image),
                remedy="Paths are relative to the folder of the file that names them",
            )  # fmt: skip
    return drawn


def one_kind(examples: Sequence[Example]) -> str:
    """The kind (see :data:`KINDS`) that all of them are.

    Raises:
        InputError: there are none.
        ConfigError: some are of another kind.
    """
    if not examples:
        raise InputError("no inputs", remedy="Give at least one")
    first = examples[0]
    for example in examples:
        if example.kind != first.kind:
            raise ConfigError(
                f"this input is {example.kind}, but the one at {first.place or 'the beginning'} is {first.kind}",
                file=example.place, remedy="Put inputs of different kinds into different files",
            )  # fmt: skip
    return first.kind


def optional(module: str) -> Any:
    """A module of an optional dependency.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = "pillow" if module.startswith("PIL") else module
        raise MissingExtraError(f"such inputs need {name}", remedy="pip install 'coremerge[learn]'") from None


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


def _rows(source: str | Path) -> Sequence[Example | None]:
    path = local_path(source)
    if path is None:
        return _on_hub(source)
    if path.is_dir():
        return _on_disk(path) if _is_dataset(path) else _images(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SourceError("not a file that inputs are read from", file=path, remedy=_SOURCES)
    return reader(path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
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
    return [Example(line, place=place) for line, place in _lines(path)]


def _json_lines(path: Path) -> list[Example]:
    rows = (_example(_parsed(line, place), place, path.parent) for line, place in _lines(path))
    examples = [example for example in rows if example is not None]
    if examples:
        one_kind(examples)
    return examples


def _parsed(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no JSON: {error}", file=place, value=line, remedy=f"One object a line. {_GIVE}") from None
    if not isinstance(row, dict):
        raise ConfigError("no JSON object", file=place, value=row, remedy=f"One object a line. {_GIVE}")
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
        remedy = f"Name the file: {others[0]}" if others else _SOURCES
        raise SourceError("no images in this folder, and it is no saved data set", file=folder, remedy=remedy)
    return [Example(image=path, place=str(path)) for path in files]


def _example(row: Mapping[str, Any], place: str, folder: Path | None) -> Example | None:
    """None where there is nothing but blank text."""
    found = {key: row[key] for key in _KEYS if row.get(key) is not None}
    if "pair" not in found and "text_pair" in found:
        found["pair"] = found.pop("text_pair")
    text, pair = (_string(found[key], key, place) if key in found else None for key in ("text", "pair"))
    messages = _messages(found["messages"], place) if "messages" in found else None
    image = _image(found["image"], place, folder) if "image" in found else None
    example = Example(text, pair, messages, image, place)
    if "text_pair" in found or example.kind not in KINDS:
        raise ConfigError(
            f"these keys make no input: {', '.join(found)}" if found else "no key of an input", file=place,
            remedy=f"{_GIVE}; its keys: {', '.join(map(str, row)) or 'none'}",
        )  # fmt: skip
    said = [turn.content for turn in messages or ()] or [text or ""]
    return example if image is not None or any(part.strip() for part in said) else None


def _string(value: object, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError("a string is needed", file=place, key=key, value=value)
    return value


def _messages(value: object, place: str) -> tuple[Message, ...]:
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in value)  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        messages = ()
    if not messages or not all(isinstance(part, str) for turn in messages for part in turn):
        raise ConfigError(
            "no chat", file=place, key="messages", value=value,
            remedy='Give [{"role": "user", "content": "..."}, ...], role and content strings',
        )  # fmt: skip
    return messages


def _image(value: object, place: str, folder: Path | None) -> Path | bytes:
    if isinstance(value, Mapping):  # of a data set, undecoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    path = Path(_string(value, "image", place)).expanduser()
    if folder is None and not path.is_absolute():
        raise ConfigError(
            "a path, which a data set of the hub cannot follow", file=place, key="image", value=str(value),
            remedy="Take a data set that holds the images, or write the inputs to a .jsonl file",
        )  # fmt: skip
    return path if folder is None else folder / path


class _DataSet(Sequence["Example | None"]):
    """The rows of a split, read when they are asked for."""

    def __init__(self, data: Any, name: str, folder: Path | None) -> None:
        kept = [key for key in _KEYS if key in data.column_names]
        if not kept:
            raise ConfigError(
                "no column of an input", file=name, key="columns", value=data.column_names,
                remedy=f"Rename columns to some of {', '.join(_KEYS)}, or write the inputs to a .jsonl file",
            )  # fmt: skip
        images = optional("datasets").Image
        self._data = data.select_columns(kept)
        if isinstance(self._data.features.get("image"), images):
            self._data = self._data.cast_column("image", images(decode=False))
        self._name, self._folder = name, folder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return _example(self._data[index], f"{self._name}, row {index}", self._folder)


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _on_disk(folder: Path) -> _DataSet:
    datasets = optional("datasets")
    data = _loaded(lambda: datasets.load_from_disk(str(folder)), "this saved data set cannot be read", folder)
    return _DataSet(*_one_split(data, str(folder), "/"), folder)


def _on_hub(source: str | Path) -> _DataSet:
    hub = None if isinstance(source, Path) else parse_hub_id(source)
    if hub is None or Path(hub.repo).suffix.lower() in {*_READERS, *IMAGES}:
        raise SourceError("no such file or folder", file=source, remedy=_SOURCES)
    datasets = optional("datasets")
    data = _loaded(
        lambda: datasets.load_dataset(
            hub.repo, revision=hub.revision, split=hub.subfolder, trust_remote_code=False
        ),
        "no such file or folder here, and the hub gives no such data set", source,
    )  # fmt: skip
    return _DataSet(*_one_split(data, str(source), ":"), None)


def _loaded(load: Callable[[], Any], what: str, source: str | Path) -> Any:
    broken = optional("datasets").exceptions.DatasetsError
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, broken) as error:
        raise SourceError(f"{what}: {first_line(error)}", file=source, remedy=_SOURCES) from None


def _one_split(data: Any, source: str, separator: str) -> tuple[Any, str]:
    """A split, and what to call it."""
    if not isinstance(data, Mapping):
        return data, source
    taken = next((split for split in (*SPLITS, *data) if split in data), None)
    if taken is None or (taken not in SPLITS and len(data) > 1):
        raise ConfigError(
            f"none of {', '.join(SPLITS)} among its splits", file=source, key="splits", value=list(data),
            remedy=f"Name one, such as {source}{separator}{taken}",
        )  # fmt: skip
    name = f"{source}{separator}{taken}"
    logging.getLogger(__name__).warning("%s has the splits %s; taken: %s", source, ", ".join(data), name)
    return data[taken], name


def first_line(error: Exception) -> str:
    """Of what it says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
