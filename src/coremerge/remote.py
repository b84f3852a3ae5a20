"""The parts of a merge of files that other processes do: each opens the files itself, and returns what it made.

An :class:`Order` is all that a worker has to know. It opens it once, looks whether the files are those that the merge
was planned with, and keeps the plan.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coremerge import __version__
from coremerge.adapter import Adapter
from coremerge.cost import cost_of_module
from coremerge.devices import check_device
from coremerge.equal import Equal, weighted
from coremerge.errors import ConfigError, MismatchError, OutputError
from coremerge.executors import Executor, remembered
from coremerge.formats.safetensors_layout import writing
from coremerge.formats.source import HubId, in_full, local_path, parse_hub_id
from coremerge.formats.writer import wide
from coremerge.held import Held
from coremerge.lowrank import LowRank
from coremerge.merging import Group, Solved, lifted, solve
from coremerge.pipeline import Given, Prepared, prepare
from coremerge.recipe import Recipe

SHARD_SECONDS = 10.0
"""Of copying a file of some gigabytes: each is a task of its own."""

EDGE = 1 << 16
"""Bytes at either end of a file by which two copies of it are told apart."""


@dataclass(frozen=True)
class Order:
    """A merge, in a form that can be sent.

    Attributes:
        given: the files.
        recipe: what to do.
        device: of the linear algebra.
        stamps: of each adapter, and of the base model that is written into: its source, and what tells its files from
            others.
        equal: what brings the adapters to one norm: see :mod:`coremerge.equal`.
        base_norms: of the plan.
        known: of the plan: what the method has to know of all modules.
        version: of coremerge.
    """

    given: Given
    recipe: Recipe
    device: str
    stamps: Sequence[tuple[str, Sequence[str]]]
    equal: Mapping[str, Equal] = field(default_factory=dict)
    base_norms: Mapping[str, float] = field(default_factory=dict)
    known: Any = None
    version: str = __version__


def order_of(prepared: Prepared, device: str) -> Order:
    """The order for a merge that was prepared here: paths in full, ids of the hub at the commit that was read."""
    adapters = prepared.plan.adapters
    given = prepared.given
    sources = tuple(_fixed(source, a.info.revision) for source, a in zip(given.sources, adapters.values(), strict=True))
    places = {name: _place(getattr(given, name)) for name in ("base", "into")}
    places_of = dict(zip(map(str, given.sources), sources, strict=True))
    initial = {places_of.get(name, name): _place(place) for name, place in (given.initial or {}).items()}
    fixed = replace(given, sources=sources, initial=initial, **places)
    plan = prepared.plan
    recipe = plan.recipe.model_copy(update={"scale": "auto"})  # set by who asks: workers need no base model for it
    return Order(fixed, recipe, device, _stamps(prepared), plan.equal, plan.base_norms, plan.known)


def _fixed(source: str | Path, revision: str | None) -> str:
    hub = None if local_path(source) or revision is None else parse_hub_id(str(source))
    return _place(source) if hub is None else _spelled(replace(hub, revision=revision))


def _spelled(hub: HubId) -> str:
    return f"{hub.repo}@{hub.revision}" + (f":{hub.subfolder}" if hub.subfolder else "")


def _place(source: Any) -> Any:
    return None if source is None else in_full(source)


def _stamps(prepared: Prepared) -> list[tuple[str, list[str]]]:
    """What is read, by the name it has for people, and what tells its files from others."""
    adapters, into = prepared.plan.adapters, prepared.into_plan
    read = [(adapter.info.source or name, list(adapter.info.files)) for name, adapter in adapters.items()]
    read += [(str(into.base.source), list(into.base.files))] if into else []
    return [(source, [_stamp(file) for file in files]) for source, files in read]


def _stamp(file: Path) -> str:
    """Its size, and a hash of its first and last bytes."""
    size = file.stat().st_size
    with file.open("rb") as data:
        digest = hashlib.sha256(data.read(EDGE))
        data.seek(max(0, size - EDGE))
        digest.update(data.read())
    return f"{size}:{digest.hexdigest()}"


def check_version(wanted: str) -> None:
    """Refuse to work for another version of coremerge than that of this process."""
    if wanted != __version__:
        raise ConfigError(
            f"the worker on {socket.gethostname()} has coremerge {__version__}", key="version", value=wanted,
            remedy="Install the same version on all machines",
        )  # fmt: skip


@remembered
def opened(order: Order) -> Prepared:
    """What the order's files say, read in this process.

    Raises:
        ConfigError: this process has another version of coremerge.
        MismatchError: the files here are not those that the merge was planned with.
        CoremergeError: see :func:`~coremerge.pipeline.prepare`.
    """
    here = socket.gethostname()
    check_version(order.version)
    check_device(order.device)
    given = vars(order.given)
    prepared = prepare(given["sources"], order.recipe, **{k: v for k, v in given.items() if k != "sources"})
    for (source, expected), (_, found) in zip(order.stamps, _stamps(prepared), strict=True):
        if expected != found:
            raise MismatchError(
                f"has other content on {here} than where the merge was planned",
                file=source,
                remedy="Give all machines the same files: on a disk that they share, or on the hub",
            )  # fmt: skip
    plan = replace(weighted(prepared.plan, order.equal), base_norms=order.base_norms, known=order.known)
    return replace(prepared, plan=plan)


def solve_group(order: Order, names: Group) -> dict[str, Solved]:
    """The merged cores of some modules."""
    plan = opened(order).plan
    found = solve(names, plan, plan.recipe.parts(), order.device)
    return {name: replace(one, combination=one.combination.map(torch.clone)) for name, one in found.items()}


def lift_module(order: Order, scale: float, dtype: torch.dtype, item: tuple[str, Solved]) -> LowRank:
    """The factors of one module as they are written."""
    return _lifted(order, scale, dict([item])).read(item[0], wide(dtype)).to(dtype)


def write_shard(order: Order, scale: float, folder: Path, item: tuple[str, Mapping[str, Solved]]) -> str:
    """A file of the base model with the merged update added; its name."""
    name, solved = item
    into = opened(order).into_plan
    assert into is not None
    if not folder.is_dir():
        raise OutputError(
            f"cannot be seen on {socket.gethostname()}", file=folder, remedy="Write to a disk that all machines share"
        )
    with writing(folder / name), suppress(FileNotFoundError):  # of an attempt whose process died
        (folder / name).unlink()
    replace(into, adapter=_lifted(order, scale, solved)).write_shard(folder, name)
    return name


def _lifted(order: Order, scale: float, solved: Mapping[str, Solved]) -> Adapter:
    plan = opened(order).plan
    reports = {name: one.report for name, one in solved.items()}
    some = replace(plan, modules={name: plan.modules[name] for name in solved})
    return lifted(some, plan.recipe.parts(), solved, reports, scale=scale, device=order.device)


class Away:
    """A merge whose parts are done by an executor.

    Args:
        prepared: the merge.
        executor: who does them.
        device: of the linear algebra there.
    """

    def __init__(self, prepared: Prepared, executor: Executor, device: str) -> None:
        self.prepared, self.executor, self.order = prepared, executor, order_of(prepared, device)

    def solve(self, groups: Sequence[Group]) -> Iterator[Mapping[str, Solved]]:
        """The merged cores of each group."""
        make = partial(solve_group, self.order)
        return self.executor.run(make, groups, self._seconds, lambda names: names)

    def writers(self, held: Held, scale: float) -> dict[str, Any]:
        """What writes the result, as an option of the function that saves it."""
        if self.prepared.into_plan:
            return {"shards": partial(self.shards, held, scale)}
        return {"factors": partial(self.factors, held, scale)}

    def factors(self, held: Held, scale: float, names: Sequence[str], dtype: torch.dtype) -> Iterator[LowRank]:
        """The factors of each module, as they are written."""
        make = partial(lift_module, self.order, scale, dtype)
        return self.executor.run(make, names, lambda name: self._seconds([name]), lambda name: (name, held[name]))

    def shards(self, held: Held, scale: float, folder: Path, names: Sequence[str]) -> Iterator[str]:
        """Files of the base model, written into ``folder``."""
        into = self.prepared.into_plan
        assert into is not None
        modules = {name: into.modules_in(name) for name in names}

        def load(name: str) -> tuple[str, dict[str, Solved]]:
            return name, {module: held[module] for module in modules[name]}

        make = partial(write_shard, self.order, scale, folder)
        return self.executor.run(make, names, lambda name: self._seconds(modules[name]) + SHARD_SECONDS, load)

    def _seconds(self, names: Sequence[str]) -> float:
        return sum(cost_of_module(self.prepared.plan, name).processor_seconds for name in names)
