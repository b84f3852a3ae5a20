"""coremerge search: the best of many merges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coremerge.cli._cluster import Address, ExecutorName
from coremerge.cli._output import facts, number, print_json, progress_bar, remark, say, table

if TYPE_CHECKING:
    from coremerge.evaluation.scoring import Scores
    from coremerge.evaluation.search import Found, Tuned


def search(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Adapters to merge; by default the tasks' own.", metavar="ADAPTER", show_default=False),
    ] = None,
    *,
    tasks: Annotated[Path, typer.Option(help="A task set: tasks.yaml, or the folder it is in.", metavar="TASKS.yaml")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The winner's recipe.", metavar="RECIPE.yaml")],
    plan: Annotated[
        Path | None,
        typer.Option(
            help="What to try: merges as in recipes, a list for every value; scales, order, budget, target."
            " Default: published methods.",
            metavar="PLAN.yaml",
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Validation scores for each merge.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the best is best in: mean, the average over tasks (default), or a joint group of the task set.",
            metavar="mean|GROUP",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not the task set's.", metavar="MODEL")
    ] = None,
    validation: Annotated[int | None, typer.Option(min=1, help="Validation rows of each task. Default: all.")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Test rows of each task. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: over all there are.")] = "cpu",
    executor: ExecutorName = "local",
    address: Address = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all that was tried.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Tune merges on validation rows.

    Every merge has the same budget, is scored once on the test rows at its best, and the winner (on validation rows)
    is written as a recipe: coremerge merge --recipe RECIPE.yaml -o OUT makes it.
    """
    from coremerge.cli import _options
    from coremerge.evaluation.plan import PLAN, read_plan
    from coremerge.evaluation.search import search_files
    from coremerge.formats.atomic import check_file, write_file

    check_file(out, overwrite=overwrite)
    wanted = PLAN if plan is None else read_plan(plan)
    changed = {key: value for key, value in (("budget", budget), ("target", target)) if value is not None}
    wanted = wanted.model_copy(update=changed)
    limits = {split: count for split, count in (("validation", validation), ("test", test)) if count is not None}
    with progress_bar(quiet) as bar, _options.executor(executor, address, device) as elsewhere:
        found = search_files(
            tasks,
            wanted,
            adapters or [],
            base=base,
            limits=limits,  # type: ignore[arg-type]
            device=device,
            executor=elsewhere,
            progress=bar,
        )
    write_file(out, found.recipe(), overwrite=overwrite)
    if as_json:
        print_json(found.to_dict() | {"path": str(out)})
    elif not quiet:
        say(render(found, out))
    for row in () if quiet else found.rows:
        if row.stopped:
            remark("note", f"{row.label}: the budget of {len(row.tried)} scores ended its search")


def render(found: Found, out: Path) -> str:
    """The merges at their best, and where the winner went."""
    headings = ["merge", "validation", "test", "± 95 %", "worst", "", "scale", "parameters", "tried"]
    target = found.target
    rows = [[row.label, f"{row.validation:.3f}", *_scores(row.scores, target), *_settings(row)] for row in found.rows]
    rows.insert(0, ["no adapter", "", *_scores(found.nothing, target), "", "", ""])
    chosen = facts(
        [
            *([("tuned for", f"{target}: accuracy, task unknown")] if target in found.nothing.joint else []),
            ("winner", found.winner.label),
            ("written to", out),
            ("use", f"coremerge merge --recipe {out} -o OUT"),
        ]
    )
    return "\n\n".join((table(headings, rows, right=(1, 2, 3, 4, 6, 8)), chosen))


def _scores(scores: Scores, target: str) -> list[str]:
    from coremerge.evaluation.search import margin_of, value_of

    margin, worst = margin_of(scores, target), scores.worst
    return [
        f"{value_of(scores, target):.3f}",
        "" if math.isnan(margin) else f"{margin:.3f}",
        *(("", "") if worst is None else (f"{scores.normalised[worst]:.3f}", worst)),
    ]


def _settings(row: Tuned) -> list[str]:
    parameters = ", ".join(f"{key} {value}" for key, value in row.parameters.items())
    return [number(float(row.recipe.scale)), parameters, str(len(row.tried))]
