"""Adapters and plans as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coremerge.cli._output import duration, facts, number, table
from coremerge.patterns import group, spans
from coremerge.text import size

if TYPE_CHECKING:
    from coremerge.adapter import Adapter, Module
    from coremerge.pipeline import Prepared
    from coremerge.plan import Plan
    from coremerge.recipe import Recipe


WIDE = 5
"""With more adapters than this, their ranks share a column."""


def adapters_line(plan: Plan) -> str:
    """How many, and which."""
    count = len(plan.adapters)
    return f"{count} adapter{'s' if count > 1 else ''}: {', '.join(plan.adapters)}"


def adapters_table(adapters: Mapping[str, Adapter], weights: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """One row an adapter."""
    shown = weights if weights and any(w != 1 for table_ in weights.values() for w in table_.values()) else None
    headings = ["adapter", "type", "modules", "rank", "scale", "dtype", "size", "base model"]
    rows = [
        [*_adapter_row(name, adapter), *([_span(shown[name].values())] if shown else [])]
        for name, adapter in adapters.items()
    ]
    return table([*headings, *(["weight"] if shown else [])], rows, right=(2, 6))


def _adapter_row(name: str, adapter: Adapter) -> list[object]:
    modules = adapter.modules.values()
    return [
        name,
        adapter.info.type,
        len(adapter),
        spans(m.rank for m in modules) or "-",
        _span(m.scale for m in modules),
        " ".join(sorted({_dtype(m) for m in modules})),
        size(sum(m.parameters * m.dtype.itemsize for m in modules)),
        adapter.info.base_model or "-",
    ]


def _span(values: Iterable[float]) -> str:
    """One number, or the smallest and the largest."""
    found = sorted(set(values))
    return "-" if not found else number(found[0]) if len(found) == 1 else f"{number(found[0])} to {number(found[-1])}"


def _dtype(module: Module) -> str:
    return str(module.dtype).removeprefix("torch.")


def _kind(module: Module) -> str:
    return f"{module.kind} {'x'.join(map(str, module.kernel))}".strip()


def modules_table(adapter: Adapter) -> str:
    """The modules of one adapter, grouped by pattern."""
    alike = {name: (m.shape, _kind(m), m.rank, m.scale, _dtype(m)) for name, m in adapter.modules.items()}
    rows = [
        [g.pattern, len(g.names), _shape(g.alike[0]), g.alike[1], g.alike[2], number(g.alike[3]), g.alike[4]]
        for g in group(alike)
    ]
    return table(["modules", "count", "out x in", "type", "rank", "scale", "dtype"], rows, right=(1, 2, 4, 5))


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def planned_modules_table(plan: Plan) -> str:
    """The modules of the result, grouped, and which adapter has them at which rank."""
    alike = {
        name: (p.module.shape, _kind(p.module), tuple(p.ranks.get(key, 0) for key in plan.adapters), p.module.rank)
        for name, p in plan.modules.items()
    }
    wide = len(plan.adapters) > WIDE
    rows = [
        [g.pattern, len(g.names), _shape(g.alike[0]), g.alike[1], *_ranks(g.alike[2], wide), g.alike[3]]
        for g in group(alike)
    ]
    headings = [
        "modules",
        "count",
        "out x in",
        "type",
        *(["ranks, in this order"] if wide else plan.adapters),
        "merged",
    ]
    return table(headings, rows, right=(1, 2, *range(4, len(headings))))


def _ranks(ranks: tuple[int, ...], wide: bool) -> list[str]:
    shown = [str(rank) if rank else "-" for rank in ranks]
    return [" ".join(shown)] if wide else shown


def recipe_line(recipe: Recipe) -> str:
    """A recipe in words."""
    resolved = recipe.resolve()
    steps = "".join(f", then {step}" for step in resolved.steps)
    basis = f", {resolved.basis} basis" if resolved.basis else ""
    return f"{resolved.method}{steps}, in {resolved.space} space{basis}"


def cut_facts(recipe: Recipe, kept: Mapping[str, float] | None = None) -> Iterator[tuple[str, str]]:
    """What a recipe cuts by itself; ``kept``: adapter → share of its energy that is kept."""
    from coremerge.report.cuts import cuts_of

    for text in cuts_of(recipe.method, recipe.parameters, recipe.steps, kept, space=recipe.space):
        yield "cut", text


def plan_text(prepared: Prepared, out: Path | None, threads: int | None) -> str:
    """What ``--dry-run`` prints."""
    plan = prepared.plan
    parts = [
        adapters_table(plan.adapters, plan.weights),
        planned_modules_table(plan),
        extras_table(plan),
        facts(_plan_facts(prepared, out, threads)),
    ]
    return "\n\n".join(filter(None, parts))


def _plan_facts(prepared: Prepared, out: Path | None, threads: int | None) -> Iterator[tuple[str, object]]:
    from coremerge.executors.local import default_threads

    plan, recipe = prepared.plan, prepared.plan.recipe
    yield "method", recipe_line(recipe)
    yield from plan.settled.items()
    yield from cut_facts(recipe)
    if recipe.norms == "equal":
        yield "norms", "made equal before merging"
    how = {
        "auto": "auto: set from norms once the cores are merged",
        "base": "auto, held to what the base's weights bear",
    }
    yield "scale", how.get(str(recipe.scale), recipe.scale)
    if prepared.into_plan:
        yield "into", prepared.into
    else:
        cut = ", as asked" if isinstance(recipe.rank, int) else ""
        yield "rank", f"at most {plan.rank}{cut}"
    yield (
        "size",
        f"{size(prepared.output_bytes)}{'' if prepared.into_plan else f' at rank {plan.rank}'}, {prepared.dtype}",
    )
    yield "memory", f"about {size(prepared.peak_bytes(threads))} at most"
    cost = prepared.cost
    yield "reads", f"{size(cost.read)} in all{f', and {size(cost.copied)} of the base' if cost.copied else ''}"
    yield "work", f"{cost.operations:.2g} operations, about {duration(cost.seconds(threads or default_threads()))}"
    yield "output", f"{out} (not written: dry run)" if out else "not written: dry run"


def extras_table(plan: Plan) -> str:
    """Whole tensors besides the updates, files beside them, and what becomes of them; empty where there are none."""
    found = [
        (heading, [[name, ", ".join(one.holders), one.decision] for name, one in decided.items()])
        for heading, decided in (("whole tensors", plan.extras), ("files beside", plan.files))
    ]
    return "\n\n".join(table([heading, "in", "what becomes of them"], rows) for heading, rows in found if rows)
