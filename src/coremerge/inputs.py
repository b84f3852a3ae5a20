"""Adapters as a person names them: where they are, what they are called, and which files they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coremerge.adapter import Adapter, Info
from coremerge.errors import ConfigError
from coremerge.formats import load
from coremerge.formats.source import locate
from coremerge.formats.urls import is_url
from coremerge.hashing import Hashes, check_download
from coremerge.naming import renamed
from coremerge.plan import name_adapters
from coremerge.recipe import Recipe

V = TypeVar("V")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the parts done and their number."""


def read_adapters(
    sources: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    vera_width: int | None = None,
    initial: Mapping[str, str | Path] | None = None,
    allow_pickle: bool = False,
    rename: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    load: Callable[..., Adapter] = load,
) -> dict[str, Adapter]:
    """The adapters in ``sources`` under unique labels.

    Arguments and errors are those of :func:`~coremerge.pipeline.merge_files`; ``load`` in place of
    :func:`coremerge.load` may know some of them already.
    """
    starts = _initials(sources, initial or {}, allow_pickle)
    adapters = []
    for done, source in enumerate(sources):
        if progress:
            progress("fetching" if is_url(source) else "reading", done, len(sources))
        start = starts.get(done)
        adapters.append(load(source, base=base, vera_width=vera_width, initial=start, allow_pickle=allow_pickle))
    return renamed(name_adapters(adapters), rename or {})


def _initials(
    sources: Sequence[str | Path], initial: Mapping[str, str | Path], allow_pickle: bool
) -> dict[int, str | Path]:
    """Index of a source → where its initial adapter is."""
    if not initial:
        return {}
    names = [{str(source), locate(source, allow_pickle=allow_pickle).name} for source in sources]
    found: dict[int, str | Path] = {}
    for name, start in initial.items():
        at = [i for i, known in enumerate(names) if name in known]
        if len(at) != 1:
            raise ConfigError(
                f"{'no' if not at else 'more than one'} adapter of that name",
                key="initial",
                value=name,
                remedy=f"Adapters: {', '.join(map(str, sources))}",
            )
        found[at[0]] = start
    return found


def by_label(named: Mapping[str, V], adapters: Iterable[str], sources: Sequence[str | Path]) -> dict[str, V]:
    """``named`` with adapters that it names by their sources under their labels.

    Raises:
        ConfigError: it names one both ways.
    """
    labels = dict(zip(map(str, sources), adapters, strict=True))
    found: dict[str, V] = {}
    for name, value in named.items():
        label = name if name in labels.values() else labels.get(name, name)
        if label in found:
            raise ConfigError(f"{label} is there twice, as {name}, too", value=name, remedy="Name each adapter once")
        found[label] = value
    return found


def with_labels(recipe: Recipe, adapters: Iterable[str], sources: Sequence[str | Path]) -> Recipe:
    """``recipe`` with adapters that it names by their sources under their labels."""
    names = list(adapters)
    changes: dict[str, Any] = {}
    if isinstance(recipe.weights, Mapping):
        changes["weights"] = by_label(recipe.weights, names, sources)
    if recipe.extras is not None:
        (changes["extras"],) = by_label({recipe.extras: None}, names, sources)
    return recipe.model_copy(update=changes) if changes else recipe


def files_of(adapters: Mapping[str, Adapter]) -> list[Path]:
    """All files that the result depends on: those that they were read from, and those beside."""
    return [file for adapter in adapters.values() for file in _named(adapter.info).values()]


def hashes_of(adapters: Mapping[str, Adapter], hashes: Hashes) -> dict[str, dict[str, str]]:
    """Adapter name → file name → SHA-256 of all files that were read, and of those beside.

    Raises:
        SourceError: one of them has changed since, or is gone.
    """
    found: dict[str, dict[str, str]] = {}
    for name, adapter in adapters.items():
        known = adapter.info.stamps
        files = _named(adapter.info)
        found[name] = {
            label: hashes.of(file, known[file]) if file in known else hashes[file] for label, file in files.items()
        }
        for label, file in files.items():
            check_download(file, found[name][label])
    return found


def _named(info: Info) -> dict[str, Path]:
    """Files by their names; the first of a name is the adapter's own, a later one the initial adapter's."""
    named: dict[str, Path] = {}
    for file in (*info.files, *info.beside.values()):
        name = file.name
        while name in named:
            name = f"initial {name}"
        named[name] = file
    return named
