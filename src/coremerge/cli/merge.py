"""coremerge merge: adapters in, one adapter out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge.cli import _data
from coremerge.cli._cluster import Address, ExecutorName
from coremerge.cli._output import Progress, duration, facts, number, print_json, progress_bar, remark, say
from coremerge.hashing import Hashes
from coremerge.text import size

if TYPE_CHECKING:
    from coremerge.learning.rows import Example
    from coremerge.outcome import Report
    from coremerge.pipeline import Merged, Prepared

LEARNED = ("match", "nsc-own", "nsc")
"""Weights that are learned first."""


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters: folders, files, URLs or hub ids (org/name, org/name@revision, org/name:subfolder).",
            metavar="ADAPTER",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.", metavar="OUT")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe in mergekit's spelling; other options override it.", metavar="FILE.yaml"),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="core (default), knots, full or ctm; ctm:rank=8.", metavar="SPACE")
    ] = None,
    basis: Annotated[
        str | None, typer.Option(help="Of the core space: stacked (default) or balanced.", metavar="BASIS")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="See `coremerge methods`. Default: whiten.", metavar="METHOD"),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="Of the method; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help="Before or after the method, in order; may be repeated.", metavar="STEP[:KEY=VALUE]"),
    ] = None,
    no_steps: Annotated[bool, typer.Option("--no-steps", help="None of the recipe's.")] = False,
    norms: Annotated[
        str | None,
        typer.Option(
            help="equal: bring adapters to one norm first; own: do not. Default: equal, but own for a named --method.",
            metavar="NORMS",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="Of the whole merged update: a number; auto (default), from norms; base, the same, but held to what"
            " the weights of --base bear.",
            metavar="SCALE",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="0.5,0.5 in the adapters' order; name=0.5,name=1; the same as JSON; a .json, .yaml or .safetensors"
            " file (also per module); or match, nsc-own, nsc: learned first, from --data on --base.",
            metavar="WEIGHTS",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Unlabelled inputs for learned --weights: see learn-weights.", metavar=_data.METAVAR),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide the weights by their sum.", show_default=False),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Of the result: a number, or exact (default).", metavar="RANK")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the result: float32, float16, bfloat16; default: the inputs' own.", metavar="DTYPE"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For methods that draw at random (dare). Default: 0.")] = None,
    extras: Annotated[
        str | None,
        typer.Option(
            help="Where adapters carry different whole tensors (modules_to_save, token rows):"
            " the adapter to take them from, average, or drop. Default: refuse.",
            metavar="POLICY",
        ),
    ] = None,
    allow_disjoint: Annotated[
        bool | None, typer.Option("--allow-disjoint", help="Merge adapters that share no module.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, for learned --weights and --scale base; or its config.json, for VeRA that needs it.",
            metavar="MODEL",
        ),
    ] = None,
    vera_width: Annotated[
        int | None, typer.Option(min=1, help="Instead of --base: the widest input among VeRA's modules.")
    ] = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(
            help="The adapter before training, for PiSSA, OLoRA, CorDA and LoftQ; may be repeated.",
            metavar="NAME=PATH",
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="How modules' names begin, and how they shall, where adapters have two for one; may be repeated.",
            metavar="OLD=NEW",
        ),
    ] = None,
    into: Annotated[
        str | None, typer.Option(help="Write this base model with the merged update added to it.", metavar="BASE")
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link/--copy",
            help="With --into: files of weights that do not change become hard links to the base's, or copies.",
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Draw it, too: OUT/report.html, as coremerge report does.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep what is done in .OUT.resume, and go on from there after a crash, to the same bytes."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    device: Annotated[str, typer.Option(help="Where the linear algebra runs: cpu, cuda, cuda:1.")] = "cpu",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Modules of one shape that go together. Default: 1 to 4 on the CPU, else 32."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Modules side by side. Default: all processors.")] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What the merge may take, such as 8GB: fewer threads, or a refusal up front.", metavar="SIZE"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge adapters into one.

    By default: brought to one norm, their directions whitened against each other in Core Space, scaled automatically.
    """
    with Hashes() as hashes:
        _begin(hashes, [] if dry_run else adapters or [])
        from coremerge.cli import _options
        from coremerge.pipeline import prepare

        most = _options.memory(max_memory, "--max-memory")
        cluster = _options.executor(executor, address, device)
        file = _options.recipe_file(recipe)
        for note in () if quiet else file.notes:
            remark("note", note)
        sources = adapters or list(file.models)
        if not sources:
            raise typer.BadParameter(
                "name at least one adapter, or a recipe that lists models", param_hint="ADAPTER..."
            )
        if out is None and not dry_run:
            raise typer.BadParameter("name the folder to write", param_hint="--out / -o")
        overrides = {
            "space": space,
            "basis": basis,
            "method": method,
            "parameters": _options.parameters(parameter),
            "steps": _options.steps(step, no_steps),
            "norms": norms,
            "scale": _options.number_or(scale, ("auto", "base"), "--scale"),
            "weights": None if weights in LEARNED else _options.weights(weights),
            "normalize": normalize,
            "rank": _options.whole_or(rank, "exact", "--rank"),
            "dtype": dtype,
            "seed": seed,
            "extras": extras,
            "allow_disjoint": allow_disjoint,
        }
        given = _options.override(file.recipe, {k: v for k, v in overrides.items() if v is not None})
        _data.pairs_of(data or (), sources)
        if (weights in LEARNED) != bool(data) or (weights in LEARNED and not base):
            raise typer.BadParameter(
                "match, nsc-own and nsc go with --base and --data, and only they", param_hint="--weights"
            )
        if weights in LEARNED:
            given = given.model_copy(update={"weights": None})
        with progress_bar(quiet) as progress:
            prepared = prepare(
                sources,
                given,
                out=out,
                into=into,
                link=link,
                base=base or file.base_model,
                vera_width=vera_width,
                initial=_options.initial(initial, sources),
                rename=_options.rename(rename),
                allow_pickle=allow_pickle,
                overwrite=overwrite,
                progress=progress,
            )
            if weights in LEARNED and not dry_run:
                named = _data.inputs_of(data or (), prepared.plan.adapters, sources)
                prepared = _learned(prepared, str(base), named, progress, objective=weights, seed=seed or 0)
            if not dry_run:
                assert out is not None
                command = ["coremerge", *sys.argv[1:]]
                how: dict[str, Any] = {"threads": threads, "device": device, "batch": batch, "max_memory": most}
                how |= {"command": command, "hashes": hashes, "progress": progress, "resume": resume}
                with _said_if_unfinished(), cluster as elsewhere:
                    merged = prepared.run(out, executor=elsewhere, **how)
                if report:
                    draw(out, weights, threads, progress)
        if dry_run:
            if most is not None:
                threads = prepared.threads_within(most, threads, batch)
            _show_plan(prepared, out, threads, as_json, quiet)
        else:
            _show_result(merged, as_json, quiet)
        learned = weights in LEARNED or str(weights).endswith(".safetensors")
        if learned and method is None and recipe is None and not quiet:
            remark("note", "learned weights are for --method sum --scale 1; here they come on top of equal norms")


@contextmanager
def _said_if_unfinished() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if kept := getattr(error, "kept_in", None):
            remark("note", f"what is done is kept in {kept}: the same command goes on from there")
        raise


def draw(out: Path, weights: str | None, threads: int | None, progress: Progress) -> None:
    from coremerge.formats.atomic import write_file
    from coremerge.report.page import FILE, report_page

    learned = weights if str(weights).endswith(".safetensors") else None
    page = report_page(out, weights=learned, threads=threads, progress=progress)
    write_file(out / FILE, page, overwrite=True)


def _learned(
    prepared: Prepared, base: str, data: Mapping[str, str | list[Example]], progress: Progress, **settings: Any
) -> Prepared:
    from coremerge.cli.learn_weights import learned

    return prepared.weighted(learned(prepared.plan.adapters, base, data, progress, lambda: False, **settings))


def _begin(hashes: Hashes, sources: Iterable[str]) -> None:
    """Start with the files that the model card will name, while torch is imported."""
    for source in sources:
        for path in (Path(source), Path(source, "adapter_model.safetensors")):
            if os.path.isfile(path):  # noqa: PTH113 - no name that the system does not take raises
                hashes.start(path)


def _show_plan(prepared: Prepared, out: Path | None, threads: int | None, as_json: bool, quiet: bool) -> None:
    from coremerge.cli._describe import plan_text

    if as_json:
        print_json(prepared.to_dict())
    if quiet:
        return
    if not as_json:
        say(plan_text(prepared, out, threads))
    _remarks(prepared.plan.warnings, prepared.notes, {*prepared.plan.decisions})


def _remarks(warnings: tuple[str, ...], notes: tuple[str, ...], decisions: set[str]) -> None:
    for text in warnings:
        dropped = text in decisions and ": dropped" in text
        remark("dropped" if dropped else "note" if text in decisions else "warning", text)
    for text in notes:
        remark("note", text)


def _show_result(merged: Merged, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(merged.to_dict())
    if quiet:
        return
    if not as_json:
        say(facts(_result_facts(merged)))
    _remarks(merged.report.warnings, merged.notes, {*merged.plan.decisions})


def _lost(report: Report) -> str:
    if not report.scale or not any(module.norm for module in report.modules.values()):
        return "all: the result is zero"
    return f"{report.lost:.2%}" if report.lost else "none"


def _result_facts(merged: Merged) -> Iterator[tuple[str, object]]:
    from coremerge.cli._describe import adapters_line, cut_facts, recipe_line
    from coremerge.equal import said
    from coremerge.pipeline import dtype_name
    from coremerge.report.cuts import taken_as_it_is

    plan, report, saved = merged.plan, merged.report, merged.saved
    everywhere = sum(len(planned.ranks) == len(plan.adapters) for planned in plan.modules.values())
    yield "merged", adapters_line(plan)
    yield "modules", f"{len(plan.modules)}, of which {everywhere} in every adapter"
    yield "method", recipe_line(plan.recipe)
    yield from plan.settled.items()
    if report.norm_factors:
        yield "norms", said(report.norm_factors)
    yield "scale", f"{number(report.scale)}{f' ({plan.recipe.scale})' if isinstance(plan.recipe.scale, str) else ''}"
    if merged.into is None:
        yield "rank", report.rank
    else:
        yield "into", merged.into
    yield "energy lost", _lost(report)
    yield from cut_facts(plan.recipe, report.input_kept)
    yield from (("as it is", text) for text in taken_as_it_is(plan, report))
    yield "size", f"{size(saved.bytes)}, {dtype_name(saved.dtype)}"
    yield "time", f"{duration(merged.seconds)}, of which merging {duration(report.seconds)}"
    yield "written to", saved.path
