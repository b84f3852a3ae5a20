"""The figures of docs/figures, drawn anew from results.json: ``python -m benchmarks.figures``.

Nothing is measured here: each benchmark puts its numbers there. A figure whose numbers are missing is left out, and
said.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import readme, results
from benchmarks.accuracy import compression
from benchmarks.accuracy.work import EXAMPLE
from benchmarks.accuracy.worlds import common_draws, rows_of
from benchmarks.speed import operations
from coremerge.evaluation import read_taskset

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 4,
    "savefig.dpi": 150, "figure.constrained_layout.use": True,
}  # fmt: skip
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#000000", "#8c6d31",
           "#7b4173", "#637939"]  # fmt: skip
"""Told apart by colour-blind eyes, too (Okabe and Ito's); then some more."""

MARKS = "os^Dv<>PX*h"
Numbers = Mapping[str, Any]


def cost(known: Numbers) -> Figure:
    """Operations of three ways, and measured seconds of this one, over T, n and r."""
    growth, modules = known["Speed: how cost grows"], known["Speed: one module"]
    sweeps: list[tuple[str, str, Callable[[int], tuple[int, int, int, int]]]] = [
        ("adapters T", "adapters T (r = 16)", lambda t: (4096, 4096, t, 16)),
        ("width m = n", "width m = n", lambda n: (n, n, 6, 16)),
        ("rank r", "rank r (T = 6)", lambda r: (4096, 4096, 6, r)),
    ]
    figure = Figure(figsize=(9, 5.2))
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    ways = {"dense TSV": operations.dense, "KnOTS": operations.knots, "core": operations.core}
    for column, (title, name, sizes) in enumerate(sweeps):
        taken = {int(value): seconds for value, seconds in growth[name].items()}
        values = sorted(taken)
        for (way, count), colour in zip(ways.items(), COLOURS, strict=False):
            axes[0, column].loglog(values, [count(*sizes(v)) for v in values], color=colour, label=way)
        axes[1, column].loglog(values, [taken[v] for v in values], "o-", color=COLOURS[2], label="core, one thread")
        at = {"adapters T": 6, "width m = n": 4096, "rank r": 16}[title]
        for way, colour in (("dense TSV", COLOURS[0]), ("KnOTS, dense SVD of m×Tn", COLOURS[1])):
            seconds = [row["seconds"] for row in modules if row["way"] == way and row["size"] == [4096, 4096]]
            axes[1, column].loglog([at] * len(seconds), seconds, "D", color=colour, label=way)
        axes[1, column].set_xlabel(title)
        ticks(axes[1, column], values)
    axes[0, 0].set_ylabel("operations, one module")
    axes[1, 0].set_ylabel("seconds, one module")
    axes[0, 0].legend()
    axes[1, 0].legend()
    return figure


def ticks(axes: Axes, values: Sequence[int]) -> None:
    """These values, as they are."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def discarded(known: Numbers) -> Figure:
    """Score over the components that were left out."""
    numbers = known["Accuracy: discarded components"]
    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    for (label, scores), colour, mark in zip(numbers["scores"].items(), COLOURS, MARKS, strict=False):
        axes.plot([float(p) for p in scores], list(scores.values()), mark + "-", color=colour, label=short(label))
    axes.set_xlabel("share of a merge's components that are left out, smallest first")
    axes.set_ylabel("normalised mean score")
    axes.legend()
    share = numbers["core"] / numbers["full"]
    if share < 1:
        top = axes.secondary_xaxis("top", functions=(lambda p: 1 - share * (1 - p), lambda p: 1 - (1 - p) / share))
        top.set_xlabel(
            f"the same for {numbers['core']} components, as a share of {numbers['full']} singular values in full space"
        )
    return figure


def nothing(known: Numbers) -> float:
    """The score without any adapter."""
    return float(known["Accuracy: controls"]["no adapter"][0]["mean"])


def alignment(known: Numbers) -> Figure:
    """Subspace alignment of tasks and of the merge, in full space and core."""
    numbers = known["Accuracy: subspace alignment"]
    figure = Figure(figsize=(7, 3.4))
    axes = figure.subplots()
    places = range(len(numbers))
    for i, ((key, label), colour) in enumerate(
        zip(
            {
                "others, full": "with other tasks, full", "others, core": "with other tasks, core",
                "merge, full": "with the merge, full", "merge, core": "with the merge, core",
            }.items(),
            ["#9ecae1", COLOURS[0], "#fdae6b", COLOURS[1]],
            strict=True,
        )
    ):  # fmt: skip
        heights = [found[key] for found in numbers.values()]
        axes.bar([place + (i - 1.5) * 0.2 for place in places], heights, 0.19, color=colour, label=label)
    axes.set_xticks(places, list(numbers), rotation=20, ha="right")
    axes.set_ylabel("subspace alignment ratio")
    axes.set_ylim(0, 1.25)
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=2, loc="upper center")
    return figure


def distance(known: Numbers) -> Figure:
    """Score over the distance of embeddings, one panel a task."""
    numbers = known["Accuracy: distance of embeddings"]
    tasks = list(next(iter(numbers.values()))["distance"])
    columns = min(4, len(tasks))
    figure = Figure(figsize=(2.5 * columns, 2.4 * -(-len(tasks) // columns) + 0.8))
    panels = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).flat
    for task, axes in zip(tasks, panels, strict=False):
        for (label, found), colour, mark in zip(numbers.items(), COLOURS, MARKS, strict=False):
            axes.plot(found["distance"][task], found["score"][task], mark, color=colour, label=short(label))
        axes.set_title(task)
    for axes in list(panels):
        axes.set_visible(False)
    figure.supxlabel("mean absolute difference of embeddings from the own adapter's", fontsize=9)
    figure.supylabel("normalised score", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def output_rank(known: Numbers) -> Figure:
    """Score over the rank of the result."""
    figure = Figure(figsize=(6.6, 3.6))
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, found in known["Accuracy: output rank"].items():
        lines.setdefault(key.rpartition(", ")[0], []).append((found["rank"], found["mean"]))
    for (label, points), colour, mark in zip(lines.items(), COLOURS, MARKS, strict=False):
        axes.plot(*zip(*sorted(points), strict=True), mark + "-", color=colour, label=short(label))
    axes.axhline(nothing(known), color="0.4", linestyle=":", label="no adapter")
    axes.set_xscale("log")
    ticks(axes, sorted({rank for points in lines.values() for rank, _ in points}))
    axes.set_xlabel("rank of the result")
    axes.set_ylabel("normalised mean score")
    figure.legend(loc="outside right center")
    return figure


def scale(known: Numbers) -> Figure:
    """Score over the size of the merge, per method."""
    figure = Figure(figsize=(9, 3.8))
    panels = figure.subplots(1, 2, sharey=True)
    for key, axes in zip(("all", "pairs"), panels, strict=True):
        listed = known["Accuracy: the automatic scale"][key]
        for label, colour, mark in zip(listed[0], COLOURS, MARKS, strict=False):
            curves = [sorted((float(f), score) for f, score in one[label]["validation"].items()) for one in listed]
            points = list(zip(*curves, strict=True))  # the factors of several pairs are not quite the same
            factors = [statistics.geometric_mean(f for f, _ in point) for point in points]
            scores = [statistics.fmean(score for _, score in point) for point in points]
            axes.plot(factors, scores, mark + "-", color=colour, label=short(label))
        axes.axvline(1, color="0.4", linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "auto", "2", "4"])
        axes.minorticks_off()
        axes.set_title({"all": "all adapters", "pairs": "pairs, mean"}[key])
    panels[0].set_ylabel("normalised mean score")
    figure.supxlabel("factor of the automatic scale", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def methods(known: Numbers) -> Figure:
    """Every method in every space, as it comes and tuned."""
    numbers = known["Accuracy: methods and spaces"]
    rows = sorted(numbers.items(), key=lambda item: mean(item[1]["tuned"]))
    figure = Figure(figsize=(7, 0.24 * len(rows) + 1.1))
    axes = figure.subplots()
    for place, (label, found) in enumerate(rows):
        plain, tuned = mean(found["untuned"]), mean(found["tuned"])
        ours = label.endswith("default")
        pair(axes, place, plain, tuned, COLOURS[1] if ours else COLOURS[0])
    axes.plot([], [], "o", color=COLOURS[0], label="untuned, scale auto")
    axes.plot([], [], "o", color=COLOURS[0], markerfacecolor="white", label="scale and parameters tuned on labels")
    axes.axvline(nothing(known), color="0.4", linestyle=":", label="no adapter")
    axes.set_yticks(range(len(rows)), [short(label) for label, _ in rows])
    axes.set_xlabel("normalised mean score (own adapters: 1)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def pair(axes: Axes, place: int, plain: float, tuned: float, colour: str) -> None:
    """One way's line: as it comes, on a tuned one where both are the same."""
    axes.plot([plain, tuned], [place, place], color="0.75", linewidth=1.2, zorder=1)
    axes.plot(tuned, place, "o", markerfacecolor="white", color=colour, markersize=6)
    axes.plot(plain, place, "o", color=colour, markersize=6)


def worlds(known: Numbers) -> Figure:
    """Every way to merge in every world, as it comes and at its best scale."""
    ways = {name: label for name, label in {**readme.MERGES, **readme.LEARNED}.items() if label not in CONTROLS}
    figure = Figure(figsize=(9, 0.24 * len(ways) + 1.3))
    panels = figure.subplots(1, len(readme.WORLDS), sharey=True, sharex=True)
    for axes, (folder, title) in zip(panels, readme.WORLDS.items(), strict=True):
        numbers = known[f"Accuracy: {folder}"]
        for place, label in enumerate(reversed(ways.values())):
            plain, tuned = readme.means(numbers, label)
            colour = COLOURS[1] if label in OURS else COLOURS[0]
            pair(axes, place, plain, tuned, colour)
        for label, style in CONTROLS.items():
            axes.axvline(readme.means(numbers, label)[0], color="0.4", linestyle=style)
        axes.set_title(title)
    panels[0].set_yticks(range(len(ways)), [name.replace("`", "") for name in reversed(ways)])
    panels[0].set_xlim(0, 1)
    panels[0].set_xticks([0, 0.5, 1])
    for label, style in CONTROLS.items():
        panels[0].plot([], [], color="0.4", linestyle=style, label=label)
    panels[0].plot([], [], "o", color=COLOURS[0], label="as it comes")
    panels[0].plot([], [], "o", color=COLOURS[0], markerfacecolor="white", label="scale tuned on labels")
    panels[0].plot([], [], "s", color=COLOURS[1], label="coremerge's own")
    figure.legend(loc="outside upper center", ncols=5)
    figure.supxlabel("normalised mean score (own adapters: 1)", fontsize=9)
    return figure


def fewer(known: Numbers) -> Figure:
    """Some ways in every world, of two adapters to all of them."""
    figure = Figure(figsize=(9, 5.2))
    panels = figure.subplots(2, len(readme.WORLDS), sharey=True, sharex="col")
    for column, (folder, title) in enumerate(readme.WORLDS.items()):
        numbers = known[f"Accuracy: {folder}"]
        tasks = len(next(iter(rows_of(numbers, "all", "own adapters")))["raw"])
        counts = [count for count in ("2", "4", "8") if int(count) < tasks] + ["all"]
        same = {count: common_draws(numbers, count, FEWER.values()) for count in counts}
        for row, axes in enumerate(panels[:, column]):
            for i, (name, label) in enumerate(FEWER.items()):
                values = [readme.means(numbers, label, count, same[count]) for count in counts]
                values = [plain if row == 0 or math.isnan(tuned) else tuned for plain, tuned in values]
                axes.plot(range(len(counts)), values, MARKS[i] + "-", color=COLOURS[i], label=name, markersize=4)
            for label, style in CONTROLS.items():
                axes.axhline(readme.means(numbers, label)[0], color="0.4", linestyle=style, label=label)
            axes.set_xticks(range(len(counts)), [*counts[:-1], str(tasks)])
        panels[0, column].set_title(title)
    panels[0, 0].set_ylim(0, 1.02)
    panels[0, 0].set_ylabel("as it comes")
    panels[1, 0].set_ylabel("scale tuned on labels")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.supxlabel("adapters", fontsize=9)
    return figure


FEWER = {
    "task arithmetic": "core task arithmetic",
    "core TIES": "core ties",
    "TSV": "core tsv",
    "core TSV + Iso-C": "core tsv + isotropize",
    "coremerge's default": "core coremerge's default",
    "coremerge fit": "fit",
}
"""Name → way."""

CONTROLS = {"no adapter": ":", "no adapter, probes": "--"}
OURS = (
    "core coremerge's default",
    "core coremerge's default, scale by the base",
    "fit",
    "fit, rank 16",
    "weights: nsc-own",
    "weights: match",
)


def mean(seeds: Sequence[Mapping[str, Any]]) -> float:
    """Of the means of several seeds."""
    return sum(scores["mean"] for scores in seeds) / len(seeds)


def short(label: str) -> str:
    """A merge's label as the papers spell it."""
    for ours, theirs in SPELLING.items():
        label = label.replace(ours, theirs)
    return label


SPELLING = {
    "core coremerge's": "coremerge's",
    "tsv, null vectors kept + isotropize:span=false": "TSV + Iso-C as published",
    "sum + isotropize:span=false": "Iso-C as published",
    "tsv, null vectors kept": "TSV as published",
    "sum + isotropize": "Iso-C",
    "isotropize": "Iso-C",
    "dare_ties": "DARE-TIES",
    "ties": "TIES",
    "tsv": "TSV",
    "cart": "CART",
    "knots": "KnOTS",
}
"""In this order."""


def training(known: Numbers, folder: Path = EXAMPLE) -> Figure:
    """The null-space ratio and the score while adapters of an example train."""
    taskset = read_taskset(folder)
    curves = known[compression.section(taskset)]
    metrics = {name: task.metric for name, task in taskset.tasks.items()}
    return compression.draw(
        {name: [compression.Point(**point) for point in points] for name, points in curves.items()}, metrics
    )


FIGURES: Mapping[str, Callable[[Numbers], Figure]] = {
    "methods": methods,
    "cost": cost,
    "discarded": discarded,
    "alignment": alignment,
    "distance": distance,
    "worlds": worlds,
    "fewer": fewer,
    "compression": training,
    "compression-vision": partial(training, folder=EXAMPLE.with_name("vision")),
    "compression-generation": partial(training, folder=EXAMPLE.with_name("generation")),
    "output_rank": output_rank,
    "scale": scale,
}


def draw_all(numbers: Numbers, folder: Path) -> list[str]:
    """Write what can be drawn; the names of what cannot, as its section is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, draw in FIGURES.items():
        with rc_context(STYLE):
            try:
                figure = draw(numbers)
            except KeyError as error:
                missing.append(f"{name}: {error.args[0]} is not in results.json")
                continue
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    return missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of results.json")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the figures")
    given = parser.parse_args(arguments)
    known = json.loads((given.results / "results.json").read_text())
    for line in draw_all({name: section["numbers"] for name, section in known.items()}, given.output):
        print(f"left out: {line}")


if __name__ == "__main__":
    main()
