"""Does the null-space ratio follow the score while an adapter trains? ``python -m benchmarks.accuracy.compression``.

Trains adapters of an example anew, with its own script (``follow.py`` in its folder); every few steps the ratio is
measured on 64 inputs and the score on validation rows. ``--quick``: a few steps of two tasks, to see that it runs.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.accuracy.work import EXAMPLE, kind_of
from coremerge.errors import CoremergeError
from coremerge.evaluation import TaskSet, read_taskset
from coremerge.evaluation.metrics import METRICS
from coremerge.learning.callback import null_space_of_training

SECTION = "Accuracy: compression while training"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EARLY, EVERY = (0, 2, 4, 6, 8, 12, 16), 10


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: of the optimiser.
        score: of validation rows, larger is better.
        ratio: ω, averaged over tokens, then modules.
        last: that of the last quarter of the blocks alone, as ``learn_weights`` counts.
    """

    step: int
    score: float
    ratio: float
    last: float


def follow(example: Any, name: str, steps: int | None, source: Path) -> list[Point]:
    """Trains one task's adapter as the example does, and measures on the way."""
    points: list[Point] = []

    def watch(step: int, model: Any, inputs: Sequence[Any], score: Callable[[], float]) -> bool:
        if step in EARLY or step % EVERY == 0:
            ratios = null_space_of_training(model, inputs)
            points.append(Point(step, score(), statistics.fmean(ratios.values()), last_quarter(ratios)))
            print(name, points[-1], flush=True)
        return steps is None or step < steps

    example.follow(name, watch, source)
    return points


def last_quarter(ratios: Mapping[str, float]) -> float:
    """The mean over the last quarter of the blocks, which are numbered in modules' names."""
    blocks = {name: int(found[0]) for name in ratios if (found := NUMBER.search(name))}
    least = 0.75 * (max(blocks.values()) + 1)
    return statistics.fmean(value for name, value in ratios.items() if blocks.get(name, -1) >= least)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Of two equally long lists."""
    return METRICS["pearson"].score(np.array(x), np.array(y))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's of the ranks; equal values share one."""
    return METRICS["spearman"].score(np.array(x), np.array(y))


Measure = Callable[[Sequence[float], Sequence[float]], float]


def correlation(points: Sequence[Point], measure: Measure, part: str = "ratio", since: int = 0) -> float:
    """Of ω and the score, from step ``since`` on."""
    kept = [point for point in points if point.step >= since]
    return measure([getattr(point, part) for point in kept], [point.score for point in kept])


def row(name: str, kind: str, points: Sequence[Point]) -> list[object]:
    """One task's line of the table."""
    half = points[-1].step // 2
    return [
        name,
        kind,
        f"{points[0].score:.2f} → {points[-1].score:.2f}",
        f"{points[0].ratio:.3f} → {points[-1].ratio:.3f}",
        *(f"{correlation(points, measure):.2f}" for measure in (pearson, spearman)),
        *(f"{correlation(points, measure, 'last'):.2f}" for measure in (pearson, spearman)),
        f"{correlation(points, spearman, since=half):.2f}",
    ]


HEADER = [
    "task", "kind", "score", "ω", "Pearson", "Spearman", "last block: Pearson", "Spearman", "second half: Spearman",
]  # fmt: skip


def means(kinds: Mapping[str, str], curves: Mapping[str, list[Point]], left_out: Sequence[str]) -> list[list[object]]:
    """Averages over tasks, the two kinds apart."""
    lines: list[list[object]] = []
    for kind in dict.fromkeys(kinds.values()):
        chosen = [points for name, points in curves.items() if kinds[name] == kind and name not in left_out]
        if not chosen:
            continue
        parts = itertools.product(("ratio", "last"), (pearson, spearman))
        values = [statistics.fmean(correlation(points, m, part) for points in chosen) for part, m in parts]
        values.append(statistics.fmean(correlation(points, spearman, since=points[-1].step // 2) for points in chosen))
        lines.append([f"mean of {len(chosen)}", kind, "", "", *(f"{value:.2f}" for value in values)])
    return lines


def draw(curves: Mapping[str, list[Point]], metrics: Mapping[str, str]) -> Figure:
    """Score over ω, one panel a task; darker is later."""
    lines = -(-len(curves) // 4)
    columns = -(-len(curves) // lines)
    figure = Figure(figsize=(3.1 * columns, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for empty in panels[len(curves) :]:
        empty.remove()
    for panel, (name, points) in zip(panels, curves.items(), strict=False):
        x, y, steps = zip(*((p.ratio, p.score, p.step) for p in points), strict=True)
        panel.plot(x, y, color="0.8", linewidth=1, zorder=1)
        dots = panel.scatter(x, y, c=steps, cmap="Blues", vmin=-0.4 * steps[-1], s=22, zorder=2)
        panel.set_title(
            f"{name}\nPearson {correlation(points, pearson):.2f}, Spearman {correlation(points, spearman):.2f}",
            fontsize=9,
        )
        panel.set_ylabel(metrics[name], fontsize=8)
        panel.tick_params(labelsize=7)
        panel.locator_params(axis="x", nbins=4)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("null-space ratio ω of the adapter's own inputs", fontsize=9)
    bar = figure.colorbar(dots, ax=figure.axes, label="training step", shrink=0.6, aspect=30)
    bar.ax.set_ylim(0, steps[-1])
    return figure


def section(taskset: TaskSet) -> str:
    """The first set's has no name."""
    return SECTION if taskset.name == EXAMPLE.name else f"{SECTION}: {taskset.name}"


def _is_vera(folder: Path) -> bool:
    return bool(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "VERA")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="folder of the example")
    parser.add_argument("--only", action="append", help="follow this task alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few steps of two tasks; results go to the work folder")
    parser.add_argument("--source", type=Path, help="folder of what rows are made of, as the example says")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    try:
        taskset = read_taskset(given.tasks)
    except CoremergeError as error:
        parser.error(str(error))
    if not (given.tasks / "follow.py").exists():
        parser.error(f"{given.tasks} has no follow.py, which says how its adapters are trained")
    sys.path.insert(0, str(given.tasks.resolve()))
    example = importlib.import_module("follow")
    names = given.only or (example.TASKS[:2] if given.quick else example.TASKS)
    if unknown := [name for name in names if name not in taskset.tasks]:
        parser.error(f"{given.tasks} has no task {unknown[0]}; it has {', '.join(taskset.tasks)}")
    steps, source = 6 if given.quick else None, given.source or example.SOURCE
    curves = {name: follow(example, name, steps, source) for name in names}
    kinds = {name: kind_of(taskset.tasks[name]) for name in names}
    fixed = [name for name in names if _is_vera(taskset.own()[name])]
    lines = [row(name, kinds[name] + (" (VeRA)" if name in fixed else ""), curves[name]) for name in names]
    body = (
        "ω on 64 inputs against the score on validation rows that are others, from the first step to the last,"
        f" {len(next(iter(curves.values())))} measurements a task; negative: the score rises as ω falls. ω and scores"
        " alike move most in the first steps, which alone makes correlations large: the last column is of the second"
        " half of the steps only. VeRA's down-projection is drawn at random and never trained: only its inputs move; it"
        " is left out of the means.\n\n" + results.table(HEADER, [*lines, *means(kinds, curves, fixed)])
    )
    raw = {name: [asdict(point) for point in points] for name, points in curves.items()}
    results.write(section(taskset), body, raw, seed=0, folder=folder)


if __name__ == "__main__":
    main()
