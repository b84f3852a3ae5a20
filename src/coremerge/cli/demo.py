"""coremerge demo: the main job on the shipped example."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coremerge.demo import DemoResult, Row

EXAMPLE = Path("examples") / "minilm-wordnet"
WIDTH = 120
"""Columns of the tables where stdout is no terminal."""


def demo(
    folder: Annotated[Path | None, typer.Argument(help="A task set; by default the shipped example.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All rows and a finer grid of scales.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the merges.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Run the main job on the shipped example.

    Merge its adapters in several ways and score what comes out.
    """
    from rich.console import Console
    from rich.progress import Progress

    from coremerge.cli._output import unmarked
    from coremerge.demo import run_demo

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("demo", total=None)
        result = run_demo(
            folder or find_example(),
            full=full,
            threads=threads,
            progress=lambda label, done, total: bar.update(
                task, description=unmarked(label), completed=done, total=total
            ),
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    output = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for part in render(result):
        output.print(part)


def find_example() -> Path:
    """The shipped example: below the current folder, or in the checkout this package runs from."""
    from coremerge.errors import SourceError

    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / EXAMPLE).is_dir():
            return root / EXAMPLE
    raise SourceError("the example is not here", value=str(EXAMPLE), remedy="Run it from a clone, or name its folder")


def render(result: DemoResult) -> list[RenderableType]:
    """The comparison, and the normalised scores per task."""
    from rich.table import Table

    from coremerge.cli._output import unmarked
    from coremerge.demo import ROWS

    summary = Table(
        title=f"{unmarked(result.name)}: scores on the test rows, averaged over tasks ({result.seconds:.0f} s in all)"
    )
    summary.add_column("merge", no_wrap=True)
    for heading in ("seconds", "scale: auto", "raw", "normalised", "scale: tuned", "raw", "normalised"):
        summary.add_column(heading, justify="right")
    for row in result.rows:
        summary.add_row(*_summary(row))
    tasks = list(result.rows[0].scores.raw)
    detail = Table(title="Each task's score at the default scale, as a share of its own adapter's")
    detail.add_column("merge", no_wrap=True)
    for task in tasks:
        detail.add_column(unmarked(task.replace("_", " ")), justify="right")
    detail.add_row("own adapter, raw", *(f"{result.rows[0].scores.raw[task]:.3f}" for task in tasks))
    for row in result.rows[1:]:
        detail.add_row(row.label, *(f"{row.scores.normalised[task]:.3f}" for task in tasks))
    if result.full:
        return [summary, detail]
    used = " and ".join(f"{count} {split}" for split, count in ROWS.items())
    return [summary, detail, f"A quick look: the first {used} rows of each task. --full uses them all."]


def _summary(row: Row) -> list[str]:
    cells = [
        row.label,
        "" if row.seconds is None else f"{row.seconds:.2f}",
        "" if row.scale is None else f"{row.scale:.2f}",
        f"{row.scores.mean_raw:.3f}",
        f"{row.scores.mean:.3f}",
    ]
    if row.tuned and row.tuned_scale is not None:
        cells += [f"{row.tuned_scale:.2f}", f"{row.tuned.mean_raw:.3f}", f"{row.tuned.mean:.3f}"]
    return cells
