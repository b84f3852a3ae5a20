"""coremerge inspect: what adapters hold, how alike they are, and whether they would merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge.cli._output import number, print_json, printable, progress_bar, remark, say, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from coremerge.adapter import Adapter
    from coremerge.diagnostics import Alignment, Retention
    from coremerge.plan import Plan


def inspect(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapters: folders, files, URLs or hub ids.", metavar="ADAPTER", show_default=False),
    ],
    *,
    merged: Annotated[
        str | None, typer.Option(help="A merge of them: shows what it keeps of each.", metavar="ADAPTER")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base model or its config.json, where a VeRA adapter needs it.", metavar="MODEL"),
    ] = None,
    vera_width: Annotated[
        int | None, typer.Option(min=1, help="Instead of --base: the widest input among VeRA's modules.")
    ] = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(help="The adapter before training, for PiSSA and its kin; may be repeated.", metavar="NAME=PATH"),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="How modules' names begin, and how they shall, where adapters have two for one; may be repeated.",
            metavar="OLD=NEW",
        ),
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Modules side by side. Default: all processors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")] = False,
) -> None:
    """Show what adapters hold.

    Modules, ranks, scales, types and sizes; of several adapters also how alike they are, and what a merge would drop or
    refuse.
    """
    from coremerge.cli import _options
    from coremerge.diagnostics import align, retain
    from coremerge.formats import load
    from coremerge.inputs import read_adapters
    from coremerge.naming import agreed

    with progress_bar(quiet) as progress:
        given = read_adapters(
            adapters,
            base=base,
            vera_width=vera_width,
            initial=_options.initial(initial, adapters),
            rename=_options.rename(rename),
            allow_pickle=allow_pickle,
            progress=progress,
        )
        held = agreed(given)
        plan, refusal = _plan(held)
        alike = None
        if len(held) > 1:
            alike = align(held, threads=threads, progress=lambda done, total: progress("comparing", done, total))
        kept = retain(load(merged, base=base, allow_pickle=allow_pickle), held) if merged else None
    if as_json:
        print_json(_json(held, alike, kept, plan, refusal))
        return
    say("\n\n".join(_texts(held, alike, kept, plan)))
    if not quiet:
        _remarks(held, plan, refusal)
        for name, norm in alike.norms.items() if alike else ():
            if not norm:
                remark("warning", f"{name} is zero in all of its modules: it adds nothing to a merge")


def _plan(adapters: Mapping[str, Adapter]) -> tuple[Plan | None, str | None]:
    """What a merge would do, or why it would be refused."""
    from coremerge.errors import CoremergeError
    from coremerge.plan import make_plan
    from coremerge.recipe import Recipe

    try:
        return make_plan(adapters, Recipe()), None
    except CoremergeError as error:
        return None, str(error)


def _texts(
    adapters: Mapping[str, Adapter], alike: Alignment | None, kept: Mapping[str, Retention] | None, plan: Plan | None
) -> Iterator[str]:
    from coremerge.cli._describe import adapters_table, extras_table, modules_table, planned_modules_table

    yield adapters_table(adapters)
    if plan and len(adapters) > 1:
        yield planned_modules_table(plan)
    else:
        for name, adapter in adapters.items():
            yield (f"{printable(name)}\n" if len(adapters) > 1 else "") + modules_table(adapter)
    if plan and (plan.extras or plan.files):
        yield extras_table(plan)
    if alike:
        yield _norms_and_pairs(alike)
    if kept:
        rows = [[name, f"{k.energy:.3f}", f"{k.cosine:.3f}", f"{k.projection:.3f}"] for name, k in kept.items()]
        yield table(["kept by the merge", "energy in its span", "cosine", "projection"], rows, right=(1, 2, 3))


def _norms_and_pairs(alike: Alignment) -> str:
    """Cosines, and the share of each row's update that lies in the span of each column's."""
    names = alike.names
    rows = [
        [name, number(alike.norms[name]), *(_cell(alike.cosine[i, j], i == j) for j in range(len(names)))]
        for i, name in enumerate(names)
    ]
    cosines = table(["cosine", "norm", *names], rows, right=range(1, len(names) + 2))
    rows = [[name, *(_cell(alike.ratio[i, j], i == j) for j in range(len(names)))] for i, name in enumerate(names)]
    ratios = table(["share of norm in the span of", *names], rows, right=range(1, len(names) + 1))
    return f"{cosines}\n\n{ratios}"


def _cell(value: Any, own: bool) -> str:
    return "" if own else "-" if value.isnan() else f"{float(value):.3f}"


def _remarks(adapters: Mapping[str, Adapter], plan: Plan | None, refusal: str | None) -> None:
    for name, adapter in adapters.items():
        for note in adapter.info.notes:
            remark("note", f"{name}: {note}")
        for warning in adapter.info.warnings if len(adapters) == 1 or not plan else ():
            remark("warning", f"{name}: {warning}")
    if plan and len(adapters) > 1:
        for warning in plan.warnings:
            remark("warning", warning)
    if refusal:
        remark("a merge would be refused", refusal)


def _json(
    adapters: Mapping[str, Adapter],
    alike: Alignment | None,
    kept: Mapping[str, Retention] | None,
    plan: Plan | None,
    refusal: str | None,
) -> dict[str, Any]:
    return {
        "adapters": [_adapter_json(name, adapter) for name, adapter in adapters.items()],
        "alignment": alike.to_dict() if alike else None,
        "kept": {name: k.to_dict() for name, k in kept.items()} if kept else None,
        "merge": {"plan": plan.to_dict() if plan else None, "refused": refusal},
    }


def _adapter_json(name: str, adapter: Adapter) -> dict[str, Any]:
    info = adapter.info
    return {
        "name": name,
        "source": info.source,
        "type": info.type,
        "base_model": info.base_model,
        "revision": info.revision,
        "modules": {
            key: {
                "shape": m.shape,
                "kind": m.kind,
                "rank": m.rank,
                "scale": m.scale,
                "dtype": str(m.dtype).removeprefix("torch."),
                "bytes": m.parameters * m.dtype.itemsize,
            }
            for key, m in adapter.modules.items()
        },
        "whole_tensors": list(adapter.extras),
        "biases": list(adapter.biases),
        "files_beside": list(info.beside),
        "notes": list(info.notes),
        "warnings": list(info.warnings),
    }
