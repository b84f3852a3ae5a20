"""The numbers of a report, from a merge's folder and, where they are still there, its inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coremerge.adapter import Adapter
from coremerge.diagnostics import Alignment, align, retain_module
from coremerge.diagnostics.retention import Sums
from coremerge.errors import CoremergeError, SourceError
from coremerge.executors import local
from coremerge.formats import load
from coremerge.formats.source import locate
from coremerge.hashing import file_sha256
from coremerge.lowrank import LowRank
from coremerge.naming import agreed, renamed

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        layer: its block, if it is in one.
        kind: what it is there.
        stack: which stack of blocks that is, where the model has several.
    """

    layer: int | None
    kind: str
    stack: str = ""

    @property
    def label(self) -> str:
        """Of its kind, which other stacks may have, too."""
        return f"{self.stack} {self.kind}".strip()


@dataclass(frozen=True)
class Numbers:
    """What is drawn.

    Attributes:
        places: module → where it is.
        spectra: label of a kind → name (inputs, "merged") → singular values, averaged over the kind's modules.
        alignment: of the inputs that could be read; None where there is none.
        kept: input → module → what :func:`~coremerge.diagnostics.retain_module` found.
        missing: why inputs could not be read, in plain words.
    """

    places: Mapping[str, Place]
    spectra: Mapping[str, Mapping[str, Sequence[float]]]
    alignment: Alignment | None = None
    kept: Mapping[str, Mapping[str, Sums]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def gather(
    folder: Path,
    record: Mapping[str, Any],
    inputs: Sequence[str | Path] | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Numbers:
    """Everything that has to be computed.

    Args:
        folder: of the merge.
        record: see :func:`~coremerge.report.record.read_record`.
        inputs: where the inputs are now, in the merge's order; by default where they were.
        threads: modules side by side.
        progress: called as modules are done.

    Raises:
        CoremergeError: the merge cannot be read, or the record is of another one.
    """
    tell = progress or (lambda label, done, count: None)
    adapters, missing = read_inputs(record["inputs"], inputs)
    merged = None if record["into"] else load(folder)
    names = list(record["modules"])
    places = places_of(names)
    unknown = sorted(set(merged or ()) - set(names))
    if unknown:
        raise SourceError("the record beside it does not know this module", file=folder, key=unknown[0])
    adapters = _as_merged(adapters, record.get("rename", {}), names, merged)
    held = {**adapters, **({} if merged is None else {MERGED: merged})}
    spectra = _spectra(held, places, threads, lambda done, count: tell("spectra", done, count))
    if not adapters:
        return Numbers(places, spectra, missing=missing)
    alignment = align(adapters, threads=threads, progress=lambda done, count: tell("alignment", done, count))
    kept = {} if merged is None else _kept(adapters, merged, threads, lambda done, count: tell("kept", done, count))
    return Numbers(places, spectra, alignment, kept, missing)


MERGED = "merged"


def _as_merged(
    adapters: Mapping[str, Adapter], rename: Mapping[str, str], names: Collection[str], merged: Adapter | None
) -> dict[str, Adapter]:
    """``adapters`` under the ``names`` of the merge, whose result tells them where those that had them are gone."""
    there = [name for adapter in adapters.values() for name in (*adapter, *adapter.extras)]
    moved = renamed(adapters, {old: new for old, new in rename.items() if any(old in name for name in there)})
    best = {key: max(moved[key], own, key=lambda a: len(a.keys() & set(names))) for key, own in adapters.items()}
    found = agreed({**best, **({} if merged is None else {MERGED: merged})})
    return {key: found[key] for key in adapters}


def read_inputs(
    said: Sequence[Mapping[str, Any]], places: Sequence[str | Path] | None
) -> tuple[dict[str, Adapter], tuple[str, ...]]:
    """The inputs that are there and have not changed, and what is wrong with the others."""
    found, missing = {}, []
    for at, entry in enumerate(said):
        name = str(entry["name"])
        source = entry["source"] if places is None else str(places[at]) if at < len(places) else None
        if source is None:
            missing.append(f"{name} is not in a file")
            continue
        try:
            known, read = set(entry["sha256"].values()), entry.get("read", {})
            changed = _changed(_pickles(source, read), known)
            if not changed:
                adapter = load(source, revision=None if places else entry["revision"], **read)
                changed = _changed(adapter.info.files, known)
        except (CoremergeError, OSError) as error:
            missing.append(f"{name} cannot be read: {error}")
            continue
        if changed:
            missing.append(f"{name} has changed since the merge: {', '.join(changed)}")
        else:
            found[name] = adapter
    return found, tuple(missing)


def _pickles(source: str, read: Mapping[str, Any]) -> list[Path]:
    """What is only unpickled once it is known to be what the merge read."""
    if not read.get("allow_pickle"):
        return []
    places = [place for place in (source, read.get("initial")) if place]
    return [file for place in places for file in locate(place, allow_pickle=True).weights]


def _changed(files: Iterable[Path], known: Collection[str]) -> list[str]:
    return [file.name for file in files if known and file_sha256(file) not in known]


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Stack, block and kind of each module; kinds and stacks as short as tells them apart.

    Example:
        >>> places_of(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])["model.layers.1.mlp.up_proj"]
        Place(layer=1, kind='up_proj', stack='')
    """
    split = {name: _split(name) for name in names}
    short = _short_kinds({kind for _, _, kind in split.values()})
    stacks = _short_stacks(dict.fromkeys(stack for stack, layer, _ in split.values() if layer is not None))
    return {name: Place(layer, short[kind], stacks.get(stack, "")) for name, (stack, layer, kind) in split.items()}


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and i + 1 < len(parts)), None)
    return ("", None, name) if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def _short_kinds(kinds: Collection[str]) -> dict[str, str]:
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    count = Counter(short.values())
    return {kind: kind if count[label] > 1 else label for kind, label in short.items()}


def _short_stacks(stacks: Collection[str]) -> dict[str, str]:
    """The first part of each path that no other has there; the whole path where there is none."""
    if len(stacks) == 1:
        return dict.fromkeys(stacks, "")
    count = Counter(at for stack in stacks for at in enumerate(stack.split(".")))
    short = {stack: next((at[1] for at in enumerate(stack.split(".")) if count[at] == 1), stack) for stack in stacks}
    return short if len(set(short.values())) == len(short) else {stack: stack for stack in stacks}


def _spectra(
    held: Mapping[str, Adapter],
    places: Mapping[str, Place],
    threads: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, list[float]]]:
    work = [(name, module) for module in places for name, adapter in held.items() if module in adapter]

    def values(item: tuple[str, str]) -> list[float]:
        name, module = item
        found: list[float] = held[name][module].svd.descending.values.tolist()
        return found

    sums: dict[str, dict[str, list[list[float]]]] = {}
    for done, ((name, module), found) in enumerate(zip(work, local.run(values, work, threads), strict=True), 1):
        sums.setdefault(places[module].label, {}).setdefault(name, []).append(found)
        progress(done, len(work))
    return {
        label: {name: _mean(listed) for name, listed in by_name.items() if any(listed)}
        for label, by_name in sums.items()
    }


def _mean(listed: Sequence[Sequence[float]]) -> list[float]:
    """Place by place; a module of lower rank has zeros there."""
    longest = max(map(len, listed))
    return [sum(values[i] if i < len(values) else 0.0 for values in listed) / len(listed) for i in range(longest)]


def _kept(
    adapters: Mapping[str, Adapter], merged: Adapter, threads: int | None, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Sums]]:
    work = [(name, module) for module in merged for name, adapter in adapters.items() if module in adapter]

    def one(item: tuple[str, str]) -> Sums:
        name, module = item
        update: LowRank = adapters[name][module]
        return retain_module(merged[module], update)

    found: dict[str, dict[str, Sums]] = {name: {} for name in adapters}
    for done, ((name, module), sums) in enumerate(zip(work, local.run(one, work, threads), strict=True), 1):
        found[name][module] = sums
        progress(done, len(work))
    return found
