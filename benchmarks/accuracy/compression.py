"""Does the null-space ratio follow the score while an adapter trains? ``python -m benchmarks.accuracy.compression``.

Trains the shipped example's adapters anew, with its own script; every few steps the ratio is measured on 64 validation
inputs and the score on the other validation rows. ``--quick``: a few steps of two tasks, to see that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import results
from coremerge.evaluation.metrics import METRICS
from coremerge.learning.callback import null_space_of_training

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm-wordnet"
SECTION = "Accuracy: compression while training"
INPUTS = 64
EARLY, EVERY = (0, 2, 4, 6, 8, 12, 16), 10
LAST_BLOCK = "layer.5."
"""Of six: the last quarter, counted as ``learn_weights`` counts."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: of the optimiser.
        score: accuracy or Pearson's correlation on validation rows.
        ratio: ω, averaged over tokens, then modules.
        last: that of the last block's modules alone.
    """

    step: int
    score: float
    ratio: float
    last: float


def follow(train: Any, name: str, splits: Any, encoder: Any, steps: int | None) -> list[Point]:
    """Trains one task's adapter as the example does, and measures on the way."""
    torch.manual_seed(train.SEED)
    labels, setting = train.Targets(splits), train.SETTINGS[name]
    model = train.get_peft_model(encoder.fresh(), setting.config)
    head = torch.nn.Linear(encoder.width, labels.outputs)
    held, scored = splits["validation"][:INPUTS], splits["validation"][INPUTS:]
    data = {
        part: train.Split(encoder.rows([(e.text, e.pair) for e in rows]), labels.encode([e.label for e in rows]))
        for part, rows in {"train": splits["train"], "scored": scored}.items()
    }
    tokens = encoder.rows([(e.text, e.pair) for e in held]).tokens
    inputs = [encoder.tokenizer.pad(tokens[i : i + 16], return_tensors="pt").data for i in range(0, INPUTS, 16)]
    points: list[Point] = []

    def measure(step: int) -> bool:
        if step in EARLY or step % EVERY == 0:
            ratios = null_space_of_training(model, inputs)
            with torch.no_grad():
                answers = head(encoder.all_features(model, data["scored"].rows))
            score = labels.score(answers, data["scored"].targets)
            last = statistics.fmean(value for module, value in ratios.items() if LAST_BLOCK in module)
            points.append(Point(step, score, statistics.fmean(ratios.values()), last))
            print(name, points[-1], flush=True)
        model.train()
        return steps is None or step < steps

    train.fit(encoder, model, head, data["train"], labels, rate=setting.learning_rate, watch=measure)
    return points


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
    columns = min(4, len(curves))
    figure = Figure(figsize=(3.1 * columns, 2.9 * -(-len(curves) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flat
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of two tasks; results go to the work folder")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun etc.")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    sys.path.insert(0, str(EXAMPLE))
    import train  # type: ignore[import-not-found]

    tasks = train.cut(train.WordNet(given.wordnet), train.tasks.TASKS)
    taskset = train.read_taskset(train.HERE)
    encoder = train.Encoder(taskset.base.locate(), taskset.max_length)
    names = ["depth", "part_of_speech"] if given.quick else list(tasks)
    curves = {name: follow(train, name, tasks[name], encoder, 6 if given.quick else None) for name in names}
    kinds = {name: taskset.tasks[name].kind for name in names}
    fixed = [name for name in names if not isinstance(train.SETTINGS[name].config, train.LoraConfig)]
    lines = [row(name, kinds[name] + (" (VeRA)" if name in fixed else ""), curves[name]) for name in names]
    body = (
        f"ω on {INPUTS} validation inputs against the score on the other validation rows, from the first step to the"
        f" last, {len(next(iter(curves.values())))} measurements a task; negative: the score rises as ω falls. ω and"
        " scores alike move most in the first steps, which alone makes correlations large: the last column is of the"
        " second half of the steps only. VeRA's down-projection is drawn at random and never trained: only its inputs"
        " move; it is left out of the means.\n\n" + results.table(HEADER, [*lines, *means(kinds, curves, fixed)])
    )
    raw = {name: [asdict(point) for point in points] for name, points in curves.items()}
    results.write(SECTION, body, raw, seed=train.SEED, folder=folder)


if __name__ == "__main__":
    main()
