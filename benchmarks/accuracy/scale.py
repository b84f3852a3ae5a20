"""How far the automatic scale is from a tuned one: ``python -m benchmarks.accuracy.scale``.

The score of a merge is followed while its size grows, for all adapters, as they are and cut to one rank, for pairs and
for halves. On the halves, rules are compared that set the size without scores: their one constant is chosen on one
half's tasks and tried on the other's. ``--quick``: a few rows, to see that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.accuracy.tables import grid, tell, untuned
from benchmarks.accuracy.work import EXAMPLE, QUICK, Bench, Merged, bench_of
from coremerge import Adapter, Recipe
from coremerge.diagnostics import retain
from coremerge.evaluation.taskset import Split
from coremerge.lowrank import LowRank

LABELS = [
    "core task arithmetic", "full ties", "knots ties", "core ties", "core ties + isotropize", "core dare_ties",
    "core tsv", "core cart", "core sum + isotropize", "core tsv + isotropize", "core coremerge's default",
]  # fmt: skip
ROWS: dict[Split, int] = {"validation": 100, "test": 200}
STEP = 2**0.5
FACTORS = [STEP**k for k in range(-4, 5)]
"""Of the automatic scale."""
ONE_NORM = 0.45
"""Of the spectral norm, mean over modules: the rule of a prototype, for comparison."""
CUT = 8
PAIRS, HALVINGS = 3, 1
POINT = 0.01
SCALE = "the scale itself"
SPECTRAL, FROBENIUS = "spectral norm, mean over modules", "Frobenius norm, mean over modules"
MIXED = "geometric mean of these spectral and Frobenius norms"
TITLE, RULES_TITLE = "Accuracy: the automatic scale", "Accuracy: rules for the scale"

Score = dict[float, float]


@dataclass(frozen=True)
class Curve:
    """One merge of some adapters at several sizes.

    Attributes:
        validation: factor of the automatic scale → normalised mean score.
        sizes: measure → the merge's size at the automatic scale.
        test: what was chosen → its score on test rows.
    """

    validation: Score
    sizes: Mapping[str, float]
    test: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Curve:
        """Back from results.json, whose keys are strings."""
        return cls({float(k): v for k, v in raw["validation"].items()}, raw["sizes"], raw["test"])

    @property
    def measures(self) -> Mapping[str, float]:
        """The sizes, and what is made of two of them."""
        return {**self.sizes, MIXED: (self.sizes[SPECTRAL] * self.sizes[FROBENIUS]) ** 0.5}

    @property
    def best(self) -> float:
        """The factor with the highest score."""
        return max(self.validation, key=self.validation.__getitem__)

    def at(self, factor: float) -> float:
        """The score at any factor, between those that were measured; outside, that of the last one."""
        known = sorted(self.validation.items())
        if factor <= known[0][0]:
            return known[0][1]
        for (low, below), (high, above) in itertools.pairwise(known):
            if factor <= high:
                share = math.log(factor / low) / math.log(high / low)
                return below + share * (above - below)
        return known[-1][1]


Curves = Mapping[str, Curve]
"""By the merge's label."""


def sizes(bench: Bench, merged: Merged) -> dict[str, float]:
    """How large a merge is beside its inputs, in several ways; each grows with the scale."""
    report = merged.result.report
    modules = {name: m for name, m in report.modules.items() if m.input_norm > 0}
    spectral = [report.scale * m.norm / m.input_norm for m in modules.values()]
    found = {SPECTRAL: statistics.fmean(spectral)}
    found["spectral norm, median over modules"] = statistics.median(spectral)
    norms: dict[str, Callable[[LowRank], float]] = {
        "Frobenius norm": lambda update: float(update.norm()),
        "nuclear norm": lambda update: float(update.svd.values.sum()),
    }
    for name, norm in norms.items():
        shares = []
        for module in modules:
            own = [norm(adapter[module]) for adapter in bench.adapters.values() if module in adapter]
            shares.append(norm(merged.updates[module]) / statistics.fmean(own))
        found[f"{name}, mean over modules"] = statistics.fmean(shares)
    kept = retain(merged.updates, bench.adapters).values()
    found["projection on the inputs, mean over adapters"] = statistics.fmean(one.projection for one in kept)
    return found | {SCALE: report.scale}


def follow(bench: Bench, recipe: Recipe, *, test: bool) -> Curve:
    """Scores over sizes."""
    merged = bench.merged(recipe)

    def scores(split: Split, factors: Sequence[float]) -> Score:
        return {factor: bench.evaluator.score(merged.updates, split, factor).mean for factor in factors}

    curve = Curve(scores("validation", FACTORS), sizes(bench, merged))
    if not test:
        return curve
    one_norm = ONE_NORM / curve.sizes[SPECTRAL]
    found = scores("test", sorted({1.0, one_norm, curve.best}))
    chosen = {"auto": found[1.0], "one norm": found[one_norm], "tuned": found[curve.best]}
    return Curve(curve.validation, curve.sizes, chosen)


def cut(bench: Bench) -> Bench:
    """The adapters at one rank; their own scores are those after the cut."""
    short = {
        name: Adapter.from_updates({module: adapter[module].truncate(CUT) for module in adapter}, name=name)
        for name, adapter in bench.adapters.items()
    }
    return Bench(bench.taskset, short, bench.rows)


def pairs(bench: Bench) -> list[Bench]:
    """Some adapters, two at a time; no adapter twice."""
    names = list(bench.adapters)
    random.Random(0).shuffle(names)
    return [bench.only(names[i : i + 2]) for i in range(0, min(len(names) - 1, 2 * PAIRS), 2)]


def halves(bench: Bench) -> list[tuple[Bench, Bench]]:
    """The adapters in two halves, in different ways."""
    listed = []
    for seed in range(HALVINGS):
        names = list(bench.adapters)
        random.Random(1 + seed).shuffle(names)
        middle = len(names) // 2
        listed.append((bench.only(sorted(names[:middle])), bench.only(sorted(names[middle:]))))
    return listed


def curves(bench: Bench, labels: Sequence[str], *, test: bool = False) -> dict[str, Curve]:
    """Of every merge that is compared."""
    plan, found = grid(labels), {}
    for merge in plan.merges:
        tell(f"{' '.join(bench.adapters)}: {merge.label}", len(found), len(plan.merges))
        found[merge.label] = follow(bench, untuned(merge), test=test)
    return found


def auto_against_tuned(sets: Mapping[str, Sequence[Curves]], bench: Bench) -> str:
    """The first table."""
    rows: list[list[object]] = []
    for label in next(iter(sets.values()))[0]:
        for name, listed in sets.items():
            tests = [one[label].test for one in listed]
            auto, one_norm, tuned = (_mean(tests, key) for key in ("auto", "one norm", "tuned"))
            factor = statistics.geometric_mean(one[label].best for one in listed)
            ratio = statistics.geometric_mean(one[label].sizes[SPECTRAL] for one in listed)
            rows.append([label, name, auto, one_norm, tuned, tuned - auto, factor, ratio])
    means = [statistics.fmean(float(str(row[i])) for row in rows) for i in (2, 3, 4, 5)]
    shown = [
        [*row[:2], *(f"{x:.3f}" for x in row[2:5]), f"{row[5]:+.3f}", *(f"{x:.2f}" for x in row[6:])] for row in rows
    ]
    shown.append(["mean", "", *(f"{x:.3f}" for x in means[:3]), f"{means[3]:+.3f}", "", ""])
    header = [
        "merge",
        "adapters",
        "auto",
        f"spectral {ONE_NORM}",
        "tuned",
        "tuned - auto",
        "tuned/auto",
        "spectral, auto",
    ]
    off = sum(float(str(row[5])) > POINT for row in rows)
    return (
        f"Normalised mean on test rows of {bench.taskset.name} ({bench.rows['validation']} validation rows a task to"
        f" tune with, {bench.rows['test']} test rows), default parameters. Auto makes the product of two ratios 1, by"
        " one factor: the merge's spectral norm over its inputs' mean one, and its Frobenius norm over theirs, each a"
        f" mean over modules; spectral {ONE_NORM}: the first ratio is {ONE_NORM}; tuned: the best of"
        f" {len(FACTORS)} factors √2 apart, about auto's. Last columns: what tuning multiplied it by, and the"
        f" first ratio at auto (geometric means). Pairs: mean of {PAIRS}. Auto is more than a point below tuned in"
        f" {off} of {len(rows)} rows.\n\n" + results.table(header, shown)
    )


def _mean(tests: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.fmean(test.get(key, math.nan) for test in tests)


Losses = tuple[str, list[float], list[float]]
"""A rule, the constants that it chose, and what it lost on each merge of the other half."""


def transfers(pairs_of_halves: Sequence[tuple[Curves, Curves]]) -> Iterator[Losses]:
    """Rules with a constant from one half, tried on the other, both ways."""
    ways = [(a, b) for a, b in pairs_of_halves] + [(b, a) for a, b in pairs_of_halves]
    yield "none: scale 1", [], [_loss(curve, 1 / curve.sizes[SCALE]) for _, b in ways for curve in b.values()]
    yield f"auto: {MIXED}, 1", [], [_loss(curve, 1.0) for _, b in ways for curve in b.values()]
    one_norm = [_loss(curve, ONE_NORM / curve.sizes[SPECTRAL]) for _, b in ways for curve in b.values()]
    yield f"{SPECTRAL}, {ONE_NORM}", [], one_norm
    for measure in next(iter(ways[0][0].values())).measures:
        constants = [_constant(list(a.values()), measure) for a, _ in ways]
        tried = [(c, curve) for (_, b), c in zip(ways, constants, strict=True) for curve in b.values()]
        yield measure, constants, [_loss(curve, c / curve.measures[measure]) for c, curve in tried]
    found = [(label, _constant([a[label]], SPECTRAL), b[label]) for a, b in ways for label in b]
    yield f"{SPECTRAL}, a constant for each method", [], [_loss(x, c / x.sizes[SPECTRAL]) for _, c, x in found]


def _constant(known: Sequence[Curve], measure: str) -> float:
    """The size at which the merges score best on average."""
    tried = [curve.measures[measure] * factor for curve in known for factor in FACTORS]
    return max(tried, key=lambda size: statistics.fmean(c.at(size / c.measures[measure]) for c in known))


def _loss(curve: Curve, factor: float) -> float:
    return curve.validation[curve.best] - curve.at(factor)


def rules(pairs_of_halves: Sequence[tuple[Curves, Curves]], bench: Bench) -> str:
    """The second table."""
    rows: list[list[object]] = []
    count = len(pairs_of_halves[0][0])
    for name, constants, losses in transfers(pairs_of_halves):
        between = f"{min(constants):.2f}–{max(constants):.2f}" if constants else ""
        near = sum(loss <= POINT for loss in losses) / len(losses)
        rows.append([name, between, f"{statistics.fmean(losses):.3f}", f"{max(losses):.3f}", f"{near:.0%}"])
    return (
        f"{2 * HALVINGS} times, a rule's constant is chosen as the best on average over {count} merges of one"
        f" half of {bench.taskset.name}'s adapters, and tried on the merges of the other half: what is lost against"
        " each merge's own best scale, normalised, on the same validation rows (so the best is a little flattered)."
        " All rules set one factor for all modules.\n\n"
        + results.table(["size that is held", "constants", "lost, mean", "most", "within a point"], rows)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="another task set")
    parser.add_argument("--quick", action="store_true", help="a few rows; results go to the work folder")
    parser.add_argument("--only", choices=["tuned", "rules"], help="one of the two tables")
    parser.add_argument("--again", action="store_true", help="the tables anew, from results.json")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    bench = bench_of(parser, given.tasks, QUICK if given.quick else ROWS)
    if given.again:
        return again(bench, folder)
    labels = LABELS[-2:] if given.quick else LABELS
    if given.only != "rules":
        tuned_scales(bench, labels, folder)
    if given.only != "tuned":
        split = [(curves(a, labels), curves(b, labels)) for a, b in halves(bench)]
        listed = [[{label: asdict(c) for label, c in half.items()} for half in both] for both in split]
        results.write(titled(RULES_TITLE, bench), rules(split, bench), listed, seed=0, folder=folder)
    return None


def titled(title: str, bench: Bench) -> str:
    """A section's title, with the name of the task set where that is another than the example."""
    return title if bench.taskset.folder == EXAMPLE else f"{title}, {bench.taskset.name}"


def tuned_scales(bench: Bench, labels: Sequence[str], folder: Path) -> None:
    """The first section."""
    sets = {
        "all": [curves(bench, labels, test=True)],
        f"all, cut to rank {CUT}": [curves(cut(bench), labels, test=True)],
        "pairs": [curves(pair, labels, test=True) for pair in pairs(bench)],
    }
    raw = {name: [{label: asdict(c) for label, c in one.items()} for one in listed] for name, listed in sets.items()}
    results.write(titled(TITLE, bench), auto_against_tuned(sets, bench), raw, seed=0, folder=folder)


def again(bench: Bench, folder: Path) -> None:
    """Both tables from the numbers that are there."""
    known = json.loads((folder / "results.json").read_text())

    def back(curves: Mapping[str, Any]) -> Curves:
        return {label: Curve.read(raw) for label, raw in curves.items()}

    for title, table in ((titled(TITLE, bench), _first), (titled(RULES_TITLE, bench), _second)):
        if title not in known:
            continue
        numbers, about = known[title]["numbers"], known[title]["about"]
        results.write(title, table(numbers, back, bench), numbers, seed=0, folder=folder, about=about)


def _first(numbers: Any, back: Callable[[Any], Curves], bench: Bench) -> str:
    return auto_against_tuned({name: [back(one) for one in listed] for name, listed in numbers.items()}, bench)


def _second(numbers: Any, back: Callable[[Any], Curves], bench: Bench) -> str:
    return rules([(back(a), back(b)) for a, b in numbers], bench)


if __name__ == "__main__":
    main()
