"""Unlabelled inputs from data sets of ``datasets``: saved on disk, or on the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coremerge.errors import ConfigError, SourceError
from coremerge.formats.source import HubId
from coremerge.learning.optional import first_line, optional
from coremerge.learning.rows import KEYS, SOURCES, Example, parse_row
from coremerge.text import visible

SPLITS = ("validation", "test", "train")
"""Of a data set: the first of these that it has is taken where none is named."""


class _DataSet(Sequence["Example | None"]):
    """The rows of a split, read when they are asked for."""

    def __init__(self, data: Any, name: str, folder: Path | None) -> None:
        kept = [key for key in KEYS if key in data.column_names]
        if not kept:
            raise ConfigError(
                "no column of an input", file=name, key="columns", value=data.column_names,
                remedy=f"Rename columns to some of {', '.join(KEYS)}, or write the inputs to a .jsonl file",
            )  # fmt: skip
        self._data = data.select_columns(kept)
        for key, kind in (("image", optional("datasets").Image), ("audio", optional("datasets").Audio)):
            if isinstance(self._data.features.get(key), kind):
                self._data = self._data.cast_column(key, kind(decode=False))
        self._name, self._folder = name, folder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return parse_row(self._data[index], f"{self._name}, row {index}", self._folder)


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def on_disk(folder: Path) -> _DataSet:
    datasets = optional("datasets")
    data = _loaded(lambda: datasets.load_from_disk(str(folder)), "this saved data set cannot be read", folder)
    return _DataSet(*_one_split(data, str(folder), "/"), folder)


def on_hub(hub: HubId, source: str) -> _DataSet:
    """The rows of a data set of the hub, which ``source`` calls ``hub``."""
    datasets = optional("datasets")
    data = _loaded(
        lambda: datasets.load_dataset(
            hub.repo, revision=hub.revision, split=hub.subfolder, trust_remote_code=False
        ),
        "no such file or folder here, and the hub gives no such data set", source,
    )  # fmt: skip
    return _DataSet(*_one_split(data, source, ":"), None)


def _loaded(load: Callable[[], Any], what: str, source: str | Path) -> Any:
    broken = optional("datasets").exceptions.DatasetsError
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, broken) as error:
        raise SourceError(f"{what}: {first_line(error)}", file=source, remedy=SOURCES) from None


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
    logging.getLogger(__name__).warning("%s has the splits %s; taken: %s", source, visible(", ".join(data)), name)
    return data[taken], name
