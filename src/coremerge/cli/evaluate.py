"""coremerge evaluate: scores of adapters and merges on tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coremerge.cli._cluster import Address, ExecutorName
from coremerge.cli._output import print_json, printable, progress_bar, remark, say, table

if TYPE_CHECKING:
    from coremerge.evaluation import Evaluation, Scores

SHOWN = 8
"""Tasks that have room as columns; more are rows of a table of their own."""


def evaluate(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters (folders, files, hub ids), or folders of merged models.",
            metavar="ADAPTER|MERGED",
            show_default=False,
        ),
    ] = None,
    *,
    tasks: Annotated[Path, typer.Option(help="A task set: tasks.yaml, or the folder it is in.", metavar="TASKS.yaml")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not the task set's.", metavar="MODEL")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Some of the tasks.", metavar="TASK,TASK")] = None,
    split: Annotated[str, typer.Option(help="test or validation.", metavar="SPLIT")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task. Default: all.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the JSON to a file, too.", metavar="FILE.json")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there already.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: over all there are.")] = "cpu",
    executor: ExecutorName = "local",
    address: Address = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Score adapters and merges on tasks.

    Beside no adapter and, where the task set names them, each task's own: scores are also given as a share of theirs.
    """
    from coremerge.cli import _options
    from coremerge.evaluation.evaluate import evaluate as run
    from coremerge.formats.atomic import check_file, write_file

    if out is not None:
        check_file(out, overwrite=overwrite)
    _options.one_of(split, ("test", "validation"), "--split")
    with progress_bar(quiet) as bar, _options.executor(executor, address, device) as elsewhere:
        result = run(
            adapters or [],
            tasks,
            base=base,
            split=split,  # type: ignore[arg-type]
            limit=limit,
            only=only.split(",") if only else None,
            device=device,
            allow_pickle=allow_pickle,
            executor=elsewhere,
            progress=bar,
        )
    if out is not None:
        write_file(out, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", overwrite=overwrite)
    if as_json:
        print_json(result.to_dict())
    else:
        say(render(result))
    for row in result.rows:
        for note in () if quiet else row.notes:
            remark("note", f"{row.label}: {note}")


def render(result: Evaluation) -> str:
    """Normalised scores in one table, raw ones in another."""
    parts = [printable(f"{result.name}, {result.split} rows")]
    if any(row.scores.normalised for row in result.rows):
        headings = ["", "mean", "± 95 %", "worst", ""]
        summary = [[row.label, *_summary(row.scores)] for row in result.rows]
        parts.append("Shares of each task's own adapter's score:\n" + table(headings, summary, right=(1, 2, 3)))
    names = [*result.tasks, *result.rows[-1].scores.joint]
    labels = [row.label for row in result.rows]
    if len(names) <= SHOWN:
        lines = [[row.label, *(_raw(row.scores, name) for name in names)] for row in result.rows]
        lines.insert(0, ["", *(_kind(result, name) for name in names)])
        parts.append("Scores:\n" + table(["", *names], lines, right=range(1, len(names) + 1)))
    else:
        lines = [[name, _kind(result, name), *(_raw(row.scores, name) for row in result.rows)] for name in names]
        parts.append("Scores:\n" + table(["task", "", *labels], lines, right=range(2, len(labels) + 2)))
    if answered := _answered(result, names):
        headings, right = ["task", *labels], range(1, len(labels) + 1)
        parts.append("Log-likelihood of the right answer:\n" + table(headings, answered, right=right))
    return "\n\n".join(parts)


def _answered(result: Evaluation, names: Sequence[str]) -> list[list[str]]:
    """A line for each task that a language model answers."""
    found = [(name, [row.scores.log_likelihood.get(name) for row in result.rows]) for name in names]
    return [
        [name, *("" if value is None else f"{value:.2f}" for value in values)]
        for name, values in found
        if any(value is not None for value in values)
    ]


def _summary(scores: Scores) -> list[str]:
    margin = "" if math.isnan(scores.margin) else f"{scores.margin:.3f}"
    worst = scores.worst
    return [f"{scores.mean:.3f}", margin, *(("", "") if worst is None else (f"{scores.normalised[worst]:.3f}", worst))]


def _kind(result: Evaluation, name: str) -> str:
    if name not in result.tasks:
        return "accuracy, task unknown"
    count = result.counts[name]
    return result.tasks[name].metric + ("" if count is None else f", {count:,}")


def _raw(scores: Scores, name: str) -> str:
    value = scores.raw.get(name, scores.joint.get(name))
    if value is None:
        return ""
    if name not in scores.intervals or math.isnan(scores.intervals[name][0]):
        return f"{value:.3f}"
    low, high = scores.intervals[name]
    return f"{value:.3f} ({low:.3f}–{high:.3f})"
