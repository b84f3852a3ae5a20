"""coremerge fit: one adapter from many, fitted to a few unlabelled inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from coremerge.cli import _data
from coremerge.cli._base import BaseDtype
from coremerge.cli._cluster import Address, ExecutorName, Gpus
from coremerge.cli._output import Progress, duration, facts, number, print_json, progress_bar, remark, say
from coremerge.text import size as size_of

if TYPE_CHECKING:
    from coremerge.adapter import Adapter
    from coremerge.executors import Executor
    from coremerge.learning.files import Inputs
    from coremerge.learning.fit import FitReport
    from coremerge.merging import MergeResult
    from coremerge.pipeline import Merged, Prepared
    from coremerge.plan import Plan


def fit(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapters: folders, files, URLs or hub ids.", metavar="ADAPTER", show_default=False),
    ],
    *,
    base: Annotated[str, typer.Option(help="The base model: a folder or a hub id.", metavar="MODEL")],
    data: Annotated[list[str], typer.Option(help=_data.HELP, metavar=_data.METAVAR)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", metavar="OUT")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result, at most. Default: as it comes out.")] = None,
    rank_budget: Annotated[
        int | None, typer.Option(min=1, help="The modules' mean rank, given where it brings most.")
    ] = None,
    rank_pattern: Annotated[
        bool, typer.Option("--rank-pattern", help="Write each module at its own rank (PEFT reads it, vLLM does not).")
    ] = False,
    prior: Annotated[
        str | None,
        typer.Option(
            help="What the result is drawn to: iso (default: the sum, isotropized), merge (coremerge's default merge),"
            " router, regmean, regmean++, zero.",
            metavar="PRIOR",
            show_default=False,
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="How strongly; inf: the prior alone. Default: 0.1; 0.001 with answers of decoders.",
            show_default=False,
        ),
    ] = None,
    beyond: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Directions of its inputs that a module may read besides those that adapters read. Default: 128;"
            " 512 with answers of decoders.",
            show_default=False,
        ),
    ] = None,
    preference: Annotated[
        list[str] | None,
        typer.Option(help="How much a task's errors count; default 1. May be repeated.", metavar="NAME=NUMBER"),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            help="own (default where adapters are of models that answer): each task's adapter answers its prompts, and"
            " the answers count as well; none: prompts alone.",
            metavar="OWN|NONE",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--inputs", min=1, help="Drawn for each task.")] = 64,
    size: Annotated[int, typer.Option("--batch", min=1, help="Inputs that go together.")] = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of an input.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the result: float32, float16, bfloat16; default: the inputs' own.", metavar="DTYPE"),
    ] = None,
    base_dtype: BaseDtype = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: over all there are.")] = "cpu",
    executor: ExecutorName = "local",
    address: Address = None,
    gpus: Gpus = 1,
    seed: Annotated[int, typer.Option(help="Of the draw of inputs.")] = 0,
    extras: Annotated[
        str | None,
        typer.Option(
            help="Where adapters carry different whole tensors: the adapter to take them from, average, or drop.",
            metavar="POLICY",
        ),
    ] = None,
    allow_disjoint: Annotated[
        bool, typer.Option("--allow-disjoint", help="Fit adapters that share no module.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    into: Annotated[
        str | None, typer.Option(help="Write this base model with the merged update added to it.", metavar="BASE")
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(
            help="A folder for hidden states. Default: memory, or a temporary folder above 1 GB.", metavar="FOLDER"
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep what is done in this file, and go on from it if it is there.", metavar="FILE"),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Draw it, too: OUT/report.html.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Merge adapters by least squares on unlabelled inputs.

    So that the model passes on, for the inputs of every task, what it would with that task's own adapter: a few forward
    passes of the base model, no labels, no gradient.
    """
    from coremerge.cli import _options
    from coremerge.cli.merge import draw
    from coremerge.inputs import by_label
    from coremerge.learning.files import Inputs, loader, read_inputs
    from coremerge.learning.fit import PRIORS, prior_recipe
    from coremerge.pipeline import prepare

    if rank_pattern and into is not None:
        raise typer.BadParameter("ranks are an adapter's: leave out --into", param_hint="--rank-pattern")
    output = {"rank": rank, "dtype": dtype, "extras": extras, "allow_disjoint": allow_disjoint, "seed": seed}
    chosen = _options.one_of(prior, tuple(PRIORS), "--prior") or "iso"
    recipe = _options.override(prior_recipe(chosen), {k: v for k, v in output.items() if v is not None})
    elsewhere = _options.executor(executor, address, device, gpus)
    with progress_bar(quiet) as bar:
        prepared = prepare(
            adapters,
            recipe,
            out=out,
            into=into,
            base=base,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            progress=bar,
        )
        prepared = replace(prepared, plan=prepared.plan.spanning())
        labels = prepared.plan.adapters
        named = _data.inputs_of(data, labels, adapters)
        likes = by_label(_options.numbers(preference, "--preference"), labels, adapters)
        bar("reading inputs", 0, 1)
        inputs = Inputs(read_inputs(labels, named, count=count, seed=seed), base, size, max_length)
        answered = _answered(answers, inputs, labels)
        batches = inputs.batches()  # also where answers come to them: they are refused before a model is loaded
        if not dry_run:
            given: dict[str, Any] = {"prior": chosen, "ridge": ridge, "beyond": beyond, "preferences": likes}
            given |= {"rank_budget": rank_budget, "spill": spill, "resume": resume}
            command = ["coremerge", *sys.argv[1:]]
            with elsewhere as cluster:
                speaking = inputs if answered else None
                solve = _solver(batches, speaking, partial(loader, base, base_dtype, device), bar, cluster, **given)
                merged = prepared.run(out, command=command, progress=bar, solve=solve, rank_pattern=rank_pattern)
            if report:
                draw(out, None, None, bar)
    if dry_run:
        states = _states(prepared.plan, batches, answered, base, dtype=base_dtype, device=device)
        _show_plan(prepared, batches, answered, states, spill, as_json=as_json, quiet=quiet)
    else:
        _show(merged, as_json, quiet)


def _answered(answers: str | None, inputs: Inputs, adapters: Mapping[str, Adapter]) -> list[str]:
    """Those whose adapters answer their prompts.

    Raises:
        ConfigError: they are to, and none does.
    """
    from coremerge.cli import _options
    from coremerge.errors import ConfigError

    chosen = _options.one_of(answers, ("own", "none"), "--answers")
    if chosen == "none":
        return []
    answering = inputs.answering(adapters)
    if chosen == "own" and not answering:
        raise ConfigError(
            "no adapter is of a model that answers (task_type CAUSAL_LM or SEQ_2_SEQ_LM), the base model gives no text,"
            " or no input awaits an answer",
            key="answers", value=answers, remedy="Leave out --answers, or give prompts: text, or messages of the user",
        )  # fmt: skip
    return answering


def _solver(
    batches: Mapping[str, Any],
    answering: Inputs | None,
    load: Callable[..., Callable[[], Any]],
    bar: Progress,
    executor: Executor | None,
    **settings: Any,
) -> Callable[[Plan], MergeResult]:
    def solve(plan: Plan) -> MergeResult:
        from coremerge.learning.fit import check_settings, fit_plan

        names = ("ridge", "rank_budget", "beyond", "preferences")
        check_settings(plan, **{name: settings[name] for name in names})  # answers take a while
        bar("loading the base model", 0, 1)
        model: Any = load()
        given = batches
        if answering is not None:
            speaking = load(head=True)()
            given = answering.answered(speaking, plan.adapters, lambda done, count: bar("answering", done, count))
            model = model if executor else speaking
            del speaking  # where others run the model, there need not be one here
        how = settings | {"answered": answering is not None, "executor": executor}
        return fit_plan(model, plan, given, progress=lambda done, count: bar("fitting", done, count), **how)

    return solve


def _states(
    plan: Plan, batches: Mapping[str, Any], answered: Sequence[str], base: str, *, dtype: str, device: str
) -> int:
    """Bytes of hidden states, about; answers are taken to be as long as they can be."""
    import torch

    from coremerge.learning.files import read_config, running_dtype
    from coremerge.learning.own_answers import MOST
    from coremerge.learning.room import state_bytes

    config = read_config(base)
    dtype = running_dtype(config, dtype, device)
    named = getattr(config, "dtype", None) if dtype == "auto" else dtype
    kind = getattr(torch, str(named).removeprefix("torch."), None) or torch.float32
    decoder = not getattr(config, "is_encoder_decoder", False)
    more = {name: MOST if decoder and name in answered else 0 for name in batches}
    return state_bytes(config, plan, [_longer(x, more[name]) for name in batches for x in batches[name]], kind.itemsize)


def _longer(batch: Mapping[str, Any], more: int) -> Mapping[str, Any]:
    """A batch with so many tokens more behind each text."""
    from torch.nn.functional import pad

    return {k: pad(v, (0, more), value=1) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}


def _show_plan(
    prepared: Prepared,
    batches: Mapping[str, Any],
    answered: Sequence[str],
    states: int,
    spill: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from coremerge.cli._describe import adapters_table, extras_table, planned_modules_table
    from coremerge.learning.given import rows_of
    from coremerge.learning.room import SPILL_BYTES

    inputs = {name: sum(map(rows_of, listed)) for name, listed in batches.items()}
    where = "disk" if spill is not None or states > SPILL_BYTES else "memory"
    if as_json:
        how = {"inputs": inputs, "answers": [*answered], "states": {"bytes": states, "where": where}}
        print_json({**prepared.to_dict(), **how})
    if quiet:
        return
    if not as_json:
        plan = prepared.plan
        said = [
            ("inputs", ", ".join(f"{name} {count}" for name, count in inputs.items())),
            *([("answers", f"of their own: {', '.join(answered)}")] if answered else []),
            ("rank", f"at most {plan.rank}"),
            ("size", f"{size_of(prepared.output_bytes)}, {prepared.dtype}"),
            ("hidden states", f"about {size_of(states)}, {'in memory' if where == 'memory' else 'on disk'}"),
            ("output", "not written: dry run"),
        ]
        parts = adapters_table(plan.adapters, plan.weights), planned_modules_table(plan), extras_table(plan)
        say("\n\n".join(filter(None, (*parts, facts(said)))))
    for text in (*prepared.plan.warnings, *prepared.notes):
        remark("note", text)


def _show(merged: Merged, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(merged.to_dict())
    if quiet:
        return
    if not as_json:
        say(facts(_facts(merged)))
    for text in merged.report.warnings:
        remark("note" if text in merged.plan.warnings else "warning", text)
    for text in merged.notes:
        remark("note", text)


def _facts(merged: Merged) -> Iterator[tuple[str, object]]:
    from coremerge.cli._describe import adapters_line

    report = cast("FitReport", merged.report)
    fits = report.fits.values()
    checked = [fit for fit in fits if fit.checked] if len(merged.plan.adapters) > 1 else []
    yield "merged", adapters_line(merged.plan)
    yield "method", report.made
    if checked:
        before, after = (sum(x) / len(checked) for x in zip(*((f.prior, f.fitted) for f in checked), strict=True))
        yield "held-out error", f"{number(after)} of what no update leaves; the prior's: {number(before)}"
        yield "modules", f"{len(report.modules)}, of which {sum(f.kept for f in fits)} keep the prior"
    if report.outputs_lost:
        most = max(fit.lost for fit in fits)
        yield (
            "outputs lost",
            f"{report.outputs_lost:.2%} by the cut to rank, on average over modules; at most {most:.2%}",
        )
    if merged.into is None:
        yield "rank", _ranks([module.rank for module in report.modules.values()])
    else:
        yield "into", merged.into
    yield "hidden states", "in memory" if report.states == "memory" else "on disk"
    yield "size", f"{size_of(merged.saved.bytes)}, {str(merged.saved.dtype).removeprefix('torch.')}"
    yield "time", f"{duration(merged.seconds)}, of which fitting {duration(report.seconds)}"
    yield "written to", merged.saved.path


def _ranks(ranks: Sequence[int]) -> str:
    mean = sum(ranks) / len(ranks)
    return f"{ranks[0]}" if len(set(ranks)) == 1 else f"{max(ranks)} at most, {number(mean)} on average"
