"""The report of a fit: how far each module is from what the tasks' own adapters do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from markupsafe import Markup

from coremerge.report import svg
from coremerge.report.part import Blocks, Part

NAMED = 12
"""Modules that are named one by one."""


def fitted(record: Mapping[str, Any], blocks: Blocks) -> Iterator[Part]:
    """A section, if the record is of a fit that reached any module."""
    fit = record.get("fit") or {"modules": {}}
    modules = {name: said for name, said in fit["modules"].items() if name in blocks.places}
    if not modules:
        return
    checked = {name: said for name, said in modules.items() if said.get("checked", True)}
    figures = [("error on held-out inputs", _errors(checked, blocks))] if checked else []
    yield Part(
        "How well it is fitted",
        _explained(checked, fit["prior"]) if checked else "",
        [*figures, *_lost(modules, blocks)],
        items=[*_named(modules, blocks)],
    )


def _explained(checked: Mapping[str, Any], prior: str) -> str:
    ours, priors = (sum(map(error, checked.values())) / len(checked) for error in (_error, itemgetter("prior")))
    return (
        "By kind of module and block: how far the module's outputs are, on inputs that it was not fitted to, from those"
        " of the tasks' own adapters, as a share of how far they are without any adapter, and before a cut to a rank."
        f" 0 is as good as each task's own. On average {ours:.3g}; the prior's ({prior}) {priors:.3g}, in each place on"
        " hovering. A ring: the prior is kept there, as the fit is no better."
    )


def _error(said: Mapping[str, Any]) -> float:
    """Of what was taken."""
    return float(said["prior" if said["kept"] else "fitted"])


def _errors(modules: Mapping[str, Any], blocks: Blocks) -> Markup:
    said, ringed = {}, set()
    taken = {name: _error(one) for name, one in modules.items()}
    for i, row in enumerate(blocks.by_kind(modules)):
        for j, listed in enumerate(row):
            if not listed:
                continue
            kept = sum(one["kept"] for one in listed)
            said[i, j] = f"the prior's: {sum(one['prior'] for one in listed) / len(listed):.2f}"
            if kept:
                said[i, j] += ", kept" if kept == len(listed) else f", kept in {kept} of {len(listed)}"
                ringed.add((i, j))
    return blocks.kind_map(taken, svg.Range(0, 1), said=said, ringed=ringed)


def _lost(modules: Mapping[str, Any], blocks: Blocks) -> Iterator[tuple[str, Markup]]:
    lost = {name: said.get("lost", 0.0) for name, said in modules.items()}
    if any(lost.values()):
        colours = svg.Range(0, max(lost.values()), "{:.3f}".format)
        yield "lost by the cut to its rank, of the merged outputs", blocks.kind_map(lost, colours)


def _named(modules: Mapping[str, Any], blocks: Blocks) -> Iterator[str]:
    kept = [name for name, said in modules.items() if said["kept"]]
    unreached = [name for name in blocks.places if name not in modules]
    unchecked = [name for name, said in modules.items() if not said.get("checked", True)]
    if kept:
        yield f"{len(kept)} of {len(modules)} modules keep the prior: {_listed(kept)}"
    if unchecked:
        yield f"Too few inputs to hold some out for {len(unchecked)} of {len(modules)} modules: {_listed(unchecked)}"
    if unreached:
        yield f"No input reached {len(unreached)} of {len(blocks.places)} modules: {_listed(unreached)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
