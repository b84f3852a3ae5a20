"""Learned merge weights on the shipped example: ``python -m benchmarks.accuracy.weights``.

Weights are learned from 64 validation inputs of every task, without their labels; settings are compared on the
validation rows; what is reported is scored once on test rows. ``--quick``: few steps and rows, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from coremerge import Adapter, Recipe, load, merge
from coremerge.evaluation import Evaluator, Scores, TaskSet, read_taskset
from coremerge.evaluation.scales import Scales, walk
from coremerge.learning import Weights, learn_weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm-wordnet"
INPUTS, BATCH = 64, 4
ROWS = {"validation": 200, "test": 500}
"""Of each task, the first ones."""

SETTINGS = "Accuracy: settings of learned weights"
SUM = Recipe(method="sum", scale=1.0)
AHEAD = {
    "then isotropize": Recipe(method="sum", steps=["isotropize"]),
    "then tsv": Recipe(method="tsv"),
    "then the default (tsv, 4 directions, isotropize)": Recipe(),
}

ABLATION: Mapping[str, dict[str, Any]] = {
    "nsc as published: last quarter, 1e-3, 100 steps, start 0.3": {"objective": "nsc"},
    "nsc, start 0.4": {"objective": "nsc", "start": 0.4},
    "nsc, all modules": {"objective": "nsc", "modules": "all"},
    "nsc, per component": {"objective": "nsc", "per": "component"},
    "nsc, rate 1e-2": {"objective": "nsc", "rate": 1e-2},
    "nsc, rate 1e-2, all modules": {"objective": "nsc", "rate": 1e-2, "modules": "all"},
    "nsc, rate 1e-2, all modules, weights within 0 to 1": {
        "objective": "nsc", "rate": 1e-2, "modules": "all", "bounds": (0.0, 1.0),
    },
    "nsc, rate 1e-2, all modules, fixed total": {
        "objective": "nsc", "rate": 1e-2, "modules": "all", "fixed_total": True,
    },
    "distance to the own ratio, rate 1e-2, all modules": {"objective": "nsc-own", "rate": 1e-2, "modules": "all"},
    "distance to the own ratio, fixed total": {"objective": "nsc-own", "fixed_total": True},
    "match: all modules, 2e-2, 80 steps": {"objective": "match"},
    "match, last quarter": {"objective": "match", "modules": "last-quarter"},
    "match, per component": {"objective": "match", "per": "component"},
    "match, per adapter": {"objective": "match", "per": "adapter"},
}  # fmt: skip
"""What each setting does, on validation rows; all others as in the first of its objective."""


@dataclass
class Bench:
    """The task set, loaded once, and how much of it is used."""

    taskset: TaskSet
    adapters: dict[str, Adapter]
    evaluator: Evaluator
    steps: int | None
    learned: dict[Any, tuple[Weights, float]] = field(default_factory=dict)

    @property
    def regression(self) -> list[str]:
        return [name for name, task in self.taskset.tasks.items() if task.kind == "regression"]

    def inputs(self, seed: int) -> dict[str, list[dict[str, Tensor]]]:
        """Validation inputs drawn by ``seed``; labels stay behind."""
        draw = random.Random(seed)
        rows = {name: self.taskset.rows(name, "validation") for name in self.taskset.tasks}
        drawn = {name: draw.sample(rows[name], min(INPUTS, len(rows[name]))) for name in rows}
        return {name: [batch for _, batch in self.evaluator.encoder.batches(drawn[name], BATCH)] for name in drawn}

    def weights(self, seed: int, settings: Mapping[str, Any]) -> tuple[Weights, float]:
        """Learned weights, and the seconds that it took."""
        key = seed, repr(sorted(settings.items()))
        if key not in self.learned:
            given = dict(settings) | ({"steps": self.steps} if self.steps else {})
            start = time.perf_counter()
            heads = self.evaluator.classifiers() if given.get("objective") == "entropy" else None
            found = learn_weights(
                self.evaluator.encoder.model, self.adapters, self.inputs(seed), seed=seed, heads=heads, **given
            )
            self.learned[key] = found, time.perf_counter() - start
        return self.learned[key]

    def score(self, recipe: Recipe, weights: Any, split: str = "test") -> Scores:
        """Of the merge with ``weights``."""
        merged = merge(self.adapters, recipe.model_copy(update={"weights": weights}))
        return self.evaluator.score(dict(merged.adapter), split)  # type: ignore[arg-type]


def open_bench(quick: bool) -> Bench:
    """The shipped example."""
    torch.set_grad_enabled(True)
    taskset = read_taskset(EXAMPLE)
    adapters = {name: load(path).load() for name, path in taskset.own().items()}
    limits: Any = {"validation": 20, "test": 30} if quick else ROWS
    return Bench(taskset, adapters, Evaluator(taskset, adapters, limits), 2 if quick else None)


def ablation(bench: Bench) -> tuple[str, object]:
    """Settings side by side, on validation rows and one draw of inputs."""
    rows, raw = [], {}
    for label, settings in ABLATION.items():
        weights, seconds = bench.weights(0, settings)
        values, scores = weights.flat(), bench.score(SUM, dict(weights), "validation")
        ends = [weights.objective[at].mean().item() for at in (0, -1)]
        rows.append([label, scores.mean, *ends, values.min().item(), values.max().item(), seconds])
        raw[label] = {"scores": scores.to_dict(), "objective": ends, "seconds": seconds}
        print(*rows[-1], flush=True)
    header = ["settings", "normalised", "objective: start", "end", "least weight", "largest", "s"]
    return (
        "Plain weighted sums with weights learned from one draw of 64 inputs a task (seed 0), scored on"
        f" {ROWS['validation']} validation rows a task; batches of {BATCH}; every weight starts at 0.3 unless said"
        " otherwise.\n\n" + results.table(header, rows),
        raw,
    )


def comparison(bench: Bench, seeds: Sequence[int], best: Mapping[str, Any]) -> tuple[str, object]:
    """What is reported: test rows, several draws of inputs."""
    start = 2.4 / len(bench.adapters)
    tuned, _ = walk(lambda scale: _constant(bench, scale, "validation").mean, Scales(start=start))
    lines: list[tuple[str, list[Scores], list[float]]] = [
        (f"task arithmetic at the start ({start:.2g})", [_constant(bench, start)], []),
        (f"task arithmetic, constant tuned on labels ({tuned:.2g})", [_constant(bench, tuned)], []),
        *((f"the same recipe unweighted: {label}", [bench.score(recipe, None)], []) for label, recipe in AHEAD.items()),
    ]
    kinds: dict[str, Mapping[str, Any]] = {
        "AdaMerging (entropy, classification tasks only)": {"objective": "entropy", "modules": "all"},
        "NSC as published": {"objective": "nsc"},
        "NSC at its best settings": best,
        "match": {"objective": "match"},
    }
    for label, settings in kinds.items():
        found = [bench.weights(seed, settings) for seed in seeds]
        recipes = {"weighted sum": SUM} | (AHEAD if settings in (best, {"objective": "match"}) else {})
        for way, recipe in recipes.items():
            lines.append((f"{label}, {way}", [bench.score(recipe, dict(w)) for w, _ in found], [s for _, s in found]))
            print(label, way, [round(s.mean, 4) for s in lines[-1][1]], flush=True)
    header = [
        "weights",
        "raw",
        "normalised",
        "± over draws",
        "classification",
        "regression",
        "worst task",
        "learning s",
    ]
    rows = [_line(bench, *line) for line in lines]
    return (
        f"Weights learned from {INPUTS} validation inputs a task, no labels, {len(seeds)} draws (seeds"
        f" {', '.join(map(str, seeds))}), batches of {BATCH}; {ROWS['test']} test rows a task; averages of normalised"
        " scores over tasks, then over draws; ± is the standard deviation over draws. Best settings of NSC, by the"
        f" table above: {best}.\n\n" + results.table(header, rows),
        {label: [scores.to_dict() for scores in listed] for label, listed, _ in lines},
    )


def _constant(bench: Bench, value: float, split: str = "test") -> Scores:
    return bench.score(SUM, [value] * len(bench.adapters), split)


def _line(bench: Bench, label: str, scores: Sequence[Scores], seconds: Sequence[float]) -> list[object]:
    regression = set(bench.regression)
    kinds = [
        statistics.fmean(
            value for s in scores for name, value in s.normalised.items() if (name in regression) == wanted
        )
        for wanted in (False, True)
    ]
    means = [s.mean for s in scores]
    spread = f"{statistics.stdev(means):.3f}" if len(means) > 1 else ""
    worst = [min(s.normalised.values()) for s in scores]
    name = max({s.worst for s in scores}, key=[s.worst for s in scores].count)
    return [
        label,
        f"{statistics.fmean(s.mean_raw for s in scores):.3f}",
        f"{statistics.fmean(means):.3f}",
        spread,
        *(f"{kind:.3f}" for kind in kinds),
        f"{statistics.fmean(worst):.3f} ({name})",
        f"{statistics.fmean(seconds):.0f}" if seconds else "",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rows; results go to the work folder")
    parser.add_argument("--seeds", type=int, default=3, help="draws of inputs")
    parser.add_argument("--only", choices=["settings", "comparison"], help="one of the two tables")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    bench = open_bench(given.quick)
    if given.only != "comparison":
        body, raw = ablation(bench)
        results.write(SETTINGS, body, raw, seed=0, folder=folder)
    if given.only != "settings":
        body, raw = comparison(bench, range(given.seeds), best_settings(folder))
        results.write("Accuracy: learned weights", body, raw, seed=0, folder=folder)


def best_settings(folder: Path) -> dict[str, Any]:
    """NSC's, by the validation rows of the last run of :func:`ablation`."""
    numbers = json.loads((folder / "results.json").read_text())[SETTINGS]["numbers"]
    nsc = {label: s for label, s in ABLATION.items() if s["objective"].startswith("nsc") and label in numbers}
    return nsc[max(nsc, key=lambda label: numbers[label]["scores"]["mean"])]


if __name__ == "__main__":
    main()
