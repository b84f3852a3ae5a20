"""coremerge demo: the main job on the shipped example."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coremerge.cli._output import progress_bar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coremerge.demo import DemoResult, Row
    from coremerge.evaluation.taskset import Split

EXAMPLES = Path("examples")
WIDTH = 120
"""Columns of the tables where stdout is no terminal."""


class World(str, Enum):
    """The shipped examples."""

    TEXT = "text"
    VISION = "vision"
    GENERATION = "generation"
    VLM = "vlm"
    SPEECH = "speech"


@dataclass(frozen=True)
class Shown:
    """What a quick look at a world takes: less than four minutes on two cores.

    Attributes:
        folder: of its task set, in the folder of examples.
        rows: split → rows of each task; by default as many as of any task set.
        candidates: of the ways to merge; by default all.
        tasks: that are merged and scored; by default all. Of vision, a fit of 8 takes 8 s on two cores, of 19 95 s.
    """

    folder: str
    rows: Mapping[Split, int] | None = None
    candidates: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


FEW = ("task arithmetic", "core TSV + Iso-C", "coremerge's default")
TUNED = ("scale: tuned", "score")
EIGHT = ("position", "light", "normals", "fashion", "mask", "count", "depth", "animal")
"""Of the vision tasks: two classifications, three regressions and three dense ones."""
ANSWERED = ("past_tense", "slots", "category", "iso_date", "is_a", "number_words", "part_of_speech", "chain")
"""Of generation's: five with an answer in text, three judgements, and no two that answer one prompt in two ways."""

WORLDS: Mapping[World, Shown] = {
    World.TEXT: Shown("minilm-wordnet"),
    World.VISION: Shown("vision", {"validation": 16, "test": 48}, ("task arithmetic", "core TIES", FEW[-1]), EIGHT),
    World.GENERATION: Shown("generation", {"test": 12}, FEW, ANSWERED),
    World.VLM: Shown("vlm", {"test": 8}, FEW),
    World.SPEECH: Shown("speech", {"test": 12}, FEW),
}


def demo(
    folder: Annotated[Path | None, typer.Argument(help="A task set; by default the shipped example.")] = None,
    *,
    world: Annotated[World, typer.Option(help="Which of the shipped examples.")] = World.TEXT,
    full: Annotated[bool, typer.Option("--full", help="All rows, all merges and a finer grid of scales.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the merges.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Run the main job on a shipped example.

    Merge its adapters in several ways and score what comes out.
    """
    from rich.console import Console

    from coremerge.demo import CANDIDATES, ROWS, run_demo

    shown = WORLDS[world] if folder is None else look_at(folder)
    labels = CANDIDATES if full else shown.candidates or CANDIDATES
    with progress_bar(quiet, stages=True) as progress:
        result = run_demo(
            folder or find_example(shown.folder),
            full=full,
            candidates={label: CANDIDATES[label] for label in labels},
            rows=shown.rows or ROWS,
            tasks=shown.tasks,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    output = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for part in render(result):
        output.print(part)


def look_at(folder: Path) -> Shown:
    """What is quick for a task set: of the shipped ones as settled; a model that answers itself is slow."""
    from coremerge.evaluation.taskset import ANSWERED as KINDS
    from coremerge.evaluation.taskset import read_taskset

    taskset = read_taskset(folder)
    for shown in WORLDS.values():
        if taskset.name == shown.folder and {*shown.tasks} <= {*taskset.tasks}:
            return shown
    slow = any(task.kind in KINDS for task in taskset.tasks.values())
    return Shown(taskset.name, {"test": 12}, FEW) if slow else Shown(taskset.name)


def find_example(name: str) -> Path:
    """A shipped example: below the current folder, or in the checkout this package runs from."""
    from coremerge.errors import SourceError

    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if not (folder := root / EXAMPLES / name).is_dir():
            continue
        if not (folder / "adapters").is_dir():
            raise SourceError("no adapters are trained there yet", file=folder, remedy="Its README says how to")
        return folder
    raise SourceError(
        "the example is not here", value=str(EXAMPLES / name), remedy="Run it from a clone, or name its folder"
    )


def render(result: DemoResult) -> list[RenderableType]:
    """The comparison, and the normalised scores per task."""
    from rich.table import Table

    from coremerge.cli._output import unmarked

    summary = Table(
        title=f"{unmarked(result.name)}: scores on the test rows as shares of each task's own adapter's, averaged over"
        f" {len(result.rows[0].scores.raw)} tasks ({result.seconds:.0f} s in all)"
    )
    summary.add_column("merge", no_wrap=True)
    tuned = any(row.tuned for row in result.rows)
    for heading in ("seconds", "scale: auto", "score", *(TUNED if tuned else ())):
        summary.add_column(heading, justify="right")
    for row in result.rows:
        summary.add_row(*_summary(row))
    detail = Table(title="Each task's score at the default scale, as a share of its own adapter's")
    heading, *lines = _by_task(result)
    detail.add_column(heading[0], no_wrap=True)
    for name in heading[1:]:
        detail.add_column(name, justify="right")
    for line in lines:
        detail.add_row(*line)
    if result.used is None:
        return [summary, detail]
    used, merged = (
        " and ".join(f"{count} {split}" for split, count in result.used.items()),
        len(result.rows[0].scores.raw),
    )
    fewer = f"{merged} of {merged + result.left_out} adapters are merged, and " if result.left_out else ""
    return [summary, detail, f"A quick look: {fewer}the first {used} rows of each task are scored. --full takes all."]


def _by_task(result: DemoResult) -> list[list[str]]:
    """A line for each merge, the tasks' names first; or for each task, where tasks are more than merges."""
    from coremerge.cli._output import unmarked

    tasks, own = list(result.rows[0].scores.raw), result.rows[0].scores.raw
    lines = [["merge", *(unmarked(task.replace("_", " ")) for task in tasks)]]
    lines.append(["own adapter, raw", *(f"{own[task]:.3f}" for task in tasks)])
    lines += [[row.label, *(f"{row.scores.normalised[task]:.3f}" for task in tasks)] for row in result.rows[1:]]
    if len(tasks) <= len(result.rows):
        return lines
    turned = [list(line) for line in zip(*lines, strict=True)]
    return [["task", *turned[0][1:]], *turned[1:]]


def _summary(row: Row) -> list[str]:
    cells = [
        row.label,
        "" if row.seconds is None else f"{row.seconds:.2f}",
        "" if row.scale is None else f"{row.scale:.2f}",
        f"{row.scores.mean:.3f}",
    ]
    if row.tuned and row.tuned_scale is not None:
        cells += [f"{row.tuned_scale:.2f}", f"{row.tuned.mean:.3f}"]
    return cells
