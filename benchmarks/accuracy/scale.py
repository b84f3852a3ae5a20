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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.accuracy.tables import grid, tell, untuned
from benchmarks.accuracy.work import EXAMPLE, QUICK, Bench, Merged, open_bench
from coremerge import Adapter, Recipe
from coremerge.diagnostics import retain
from coremerge.evaluation.taskset import Split
from coremerge.lowrank import LowRank
from coremerge.recipe import AUTO_RATIO

LABELS = [
    "core task arithmetic", "full ties", "knots ties", "core ties", "core ties + isotropize", "core dare_ties",
    "core tsv", "core cart", "core sum + isotropize", "core tsv + isotropize", "core coremerge's default",
]  # fmt: skip
ROWS: dict[Split, int] = {"validation": 100, "test": 200}
STEP = 2**0.5
FACTORS = [STEP**k for k in range(-3, 6)]
"""Of the automatic scale."""
NEAR = [STEP**k for k in range(-1, 4)]
CUT = 8
PAIRS, HALVINGS = 3, 1
POINT = 0.01
SCALE = "the scale itself"
SPECTRAL, FROBENIUS = "spectral norm, mean over modules", "Frobenius norm, mean over modules"
MIXED = "geometric mean of these spectral and Frobenius norms"
TITLE, RULES_TITLE = "Accuracy: the automatic scale", "Accuracy: rules for the scale"
NORMS_TITLE = "Accuracy: a scale from two norms"

Score = dict[float, float]


@dataclass(frozen=True)
class Curve:
    """One merge of some adapters at several sizes.

    Attributes:
        validation: factor of the automatic scale → normalised mean score.
        per_module: the same where every module is brought to the ratio for itself.
        sizes: measure → the merge's size at the automatic scale.
        test: what was chosen → its score on test rows.
    """

    validation: Score
    sizes: Mapping[str, float]
    per_module: Score = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Curve:
        """Back from results.json, whose keys are strings."""
        validation, per_module = ({float(k): v for k, v in raw[name].items()} for name in ("validation", "per_module"))
        return cls(validation, raw["sizes"], per_module, raw["test"])

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


def evened(merged: Merged) -> dict[str, LowRank]:
    """Every module at the automatic ratio for itself."""
    report = merged.result.report

    def factor(name: str) -> float:
        module = report.modules[name]
        now = report.scale * module.norm / module.input_norm if module.input_norm else 0.0
        return AUTO_RATIO / now if now else 1.0

    return {name: update * factor(name) for name, update in merged.updates.items()}


def follow(bench: Bench, recipe: Recipe, *, modules: bool, test: bool) -> Curve:
    """Scores over sizes."""
    merged = bench.merged(recipe)

    def scores(updates: Mapping[str, LowRank], split: Split, factors: Sequence[float]) -> Score:
        return {factor: bench.evaluator.score(updates, split, factor).mean for factor in factors}

    curve = Curve(scores(merged.updates, "validation", FACTORS), sizes(bench, merged))
    even = evened(merged)
    per_module = scores(even, "validation", NEAR) if modules else {}
    chosen: dict[str, float] = {}
    if test:
        found = scores(merged.updates, "test", sorted({1.0, curve.best}))
        chosen = {"auto": found[1.0], "tuned": found[curve.best]}
        if modules:
            best = max(per_module, key=per_module.__getitem__)
            found = scores(even, "test", sorted({1.0, best}))
            chosen |= {"per module": found[1.0], "per module, tuned": found[best]}
    return Curve(curve.validation, curve.sizes, per_module, chosen)


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


def curves(bench: Bench, labels: Sequence[str], *, modules: bool = False, test: bool = False) -> dict[str, Curve]:
    """Of every merge that is compared."""
    plan, found = grid(labels), {}
    for merge in plan.merges:
        tell(f"{' '.join(bench.adapters)}: {merge.label}", len(found), len(plan.merges))
        found[merge.label] = follow(bench, untuned(merge), modules=modules, test=test)
    return found


def auto_against_tuned(sets: Mapping[str, Sequence[Curves]], bench: Bench) -> str:
    """The first table."""
    rows: list[list[object]] = []
    for label in next(iter(sets.values()))[0]:
        for name, listed in sets.items():
            mean = partial(_mean, [one[label].test for one in listed])
            ratio = statistics.geometric_mean(AUTO_RATIO * one[label].best for one in listed)
            rows.append(
                [label, name, f"{mean('auto'):.3f}", f"{mean('tuned'):.3f}", f"{mean('tuned') - mean('auto'):+.3f}",
                 f"{ratio:.2f}", *(f"{mean(key):.3f}" if key in listed[0][label].test else ""
                                   for key in ("per module", "per module, tuned"))]
            )  # fmt: skip
    header = ["merge", "adapters", "auto", "tuned", "tuned - auto", "tuned: ratio", "per module", "per module, tuned"]
    off = sum(float(str(row[4])) > POINT for row in rows)
    return (
        f"Normalised mean on test rows of {bench.taskset.name} ({bench.rows['validation']} validation rows a task to"
        f" tune with, {bench.rows['test']} test rows), default parameters. Auto brings the merge's spectral norm, over"
        f" the inputs' mean one, to {AUTO_RATIO} on average over modules, by one factor; tuned: that factor by steps of"
        f" √2, {FACTORS[0]:.2f} to {FACTORS[-1]:.2f} times; per module: each module to {AUTO_RATIO} by a factor of its"
        f" own. Pairs: mean of {PAIRS}. Auto is more than a point below tuned in {off} of {len(rows)} rows.\n\n"
        + results.table(header, rows)
    )


def _mean(tests: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.fmean(test.get(key, math.nan) for test in tests)


Losses = tuple[str, list[float], list[float]]
"""A rule, the constants that it chose, and what it lost on each merge of the other half."""


def transfers(pairs_of_halves: Sequence[tuple[Curves, Curves]]) -> Iterator[Losses]:
    """Rules with a constant from one half, tried on the other, both ways."""
    ways = [(a, b) for a, b in pairs_of_halves] + [(b, a) for a, b in pairs_of_halves]
    yield "none: scale 1", [], [_loss(curve, 1 / curve.sizes[SCALE]) for _, b in ways for curve in b.values()]
    yield f"auto, {AUTO_RATIO}", [], [_loss(curve, 1.0) for _, b in ways for curve in b.values()]
    yield f"{MIXED}, 1", [], [_loss(curve, 1 / curve.measures[MIXED]) for _, b in ways for curve in b.values()]
    for measure in next(iter(ways[0][0].values())).measures:
        constants = [_constant(list(a.values()), measure) for a, _ in ways]
        tried = [(c, curve) for (_, b), c in zip(ways, constants, strict=True) for curve in b.values()]
        yield measure, constants, [_loss(curve, c / curve.measures[measure]) for c, curve in tried]
    yield "spectral norm, each module for itself", *_by_module(ways)
    found = [(label, _constant([a[label]], SPECTRAL), b[label]) for a, b in ways for label in b]
    yield f"{SPECTRAL}, a constant for each method", [], [_loss(x, c / x.sizes[SPECTRAL]) for _, c, x in found]


def _constant(known: Sequence[Curve], measure: str) -> float:
    """The size at which the merges score best on average."""
    tried = [curve.measures[measure] * factor for curve in known for factor in FACTORS]
    return max(tried, key=lambda size: statistics.fmean(c.at(size / c.measures[measure]) for c in known))


def _loss(curve: Curve, factor: float) -> float:
    return curve.validation[curve.best] - curve.at(factor)


def _by_module(ways: Sequence[tuple[Curves, Curves]]) -> tuple[list[float], list[float]]:
    constants, losses = [], []
    for a, b in ways:
        best = max(NEAR, key=lambda f: statistics.fmean(c.per_module[f] for c in a.values()))
        constants.append(AUTO_RATIO * best)
        losses += [c.validation[c.best] - c.per_module[best] for c in b.values()]
    return constants, losses


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
        " All rules but one set one factor for all modules.\n\n"
        + results.table(["size that is held", "constants", "lost, mean", "most", "within a point"], rows)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="another task set")
    parser.add_argument("--quick", action="store_true", help="a few rows; results go to the work folder")
    parser.add_argument("--only", choices=["tuned", "rules"], help="one of the two tables")
    parser.add_argument("--two-norms", action="store_true", help="a better rule on the merges of an earlier run")
    parser.add_argument("--again", action="store_true", help="the tables anew, from results.json")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    bench = open_bench(given.tasks, QUICK if given.quick else ROWS)
    if given.two_norms:
        known = json.loads((folder / "results.json").read_text())[TITLE]["numbers"]
        return results.write(NORMS_TITLE, *two_norms(bench, known), seed=0, folder=folder)
    if given.again:
        return again(bench, folder)
    labels = LABELS[-2:] if given.quick else LABELS
    if given.only != "rules":
        tuned_scales(bench, labels, folder)
    if given.only != "tuned":
        split = [(curves(a, labels, modules=True), curves(b, labels, modules=True)) for a, b in halves(bench)]
        listed = [[{label: asdict(c) for label, c in half.items()} for half in both] for both in split]
        results.write(RULES_TITLE, rules(split, bench), listed, seed=0, folder=folder)
    return None


def tuned_scales(bench: Bench, labels: Sequence[str], folder: Path) -> None:
    """The first section."""
    sets = {
        "all": [curves(bench, labels, modules=True, test=True)],
        f"all, cut to rank {CUT}": [curves(cut(bench), labels, test=True)],
        "pairs": [curves(pair, labels, test=True) for pair in pairs(bench)],
    }
    raw = {name: [{label: asdict(c) for label, c in one.items()} for one in listed] for name, listed in sets.items()}
    results.write(TITLE, auto_against_tuned(sets, bench), raw, seed=0, folder=folder)


def again(bench: Bench, folder: Path) -> None:
    """Both tables from the numbers that are there."""
    known = json.loads((folder / "results.json").read_text())

    def back(curves: Mapping[str, Any]) -> Curves:
        return {label: Curve.read(raw) for label, raw in curves.items()}

    for title, table in ((TITLE, _first), (RULES_TITLE, _second)):
        numbers, about = known[title]["numbers"], known[title]["about"]
        results.write(title, table(numbers, back, bench), numbers, seed=0, folder=folder, about=about)


def two_norms(bench: Bench, known: Mapping[str, Any]) -> tuple[str, object]:
    """The rule that holds :data:`MIXED` at 1, on test rows, beside what is known of auto and tuned."""
    made = {"all": [bench], f"all, cut to rank {CUT}": [cut(bench)], "pairs": pairs(bench)}
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for name, benches in made.items():
        for merge in grid(list(known[name][0])).merges:
            kept = [Curve.read(one[merge.label]) for one in known[name]]
            found = []
            for one, curve in zip(benches, kept, strict=True):
                merged = one.merged(untuned(merge))
                found.append(one.evaluator.score(merged.updates, "test", 1 / curve.measures[MIXED]).mean)
            auto, best = (statistics.fmean(curve.test[key] for curve in kept) for key in ("auto", "tuned"))
            mean = statistics.fmean(found)
            rows.append([merge.label, name, f"{auto:.3f}", f"{mean:.3f}", f"{best:.3f}"])
            raw[f"{name}: {merge.label}"] = {"auto": auto, "two norms": found, "tuned": best}
            tell(merge.label, len(rows), 3 * len(known[name][0]))
    means = (statistics.fmean(float(str(row[i])) for row in rows) for i in (2, 3, 4))
    rows.append(["mean", "", *(f"{value:.3f}" for value in means)])
    return (
        "One factor that makes the product of two ratios 1: the merge's spectral norm over its inputs' mean one, and"
        " its Frobenius norm over theirs, each a mean over modules. A flat spectrum has a large Frobenius norm and gets"
        " a smaller factor, a merge of few adapters a larger one. The rule was thought of from the table of methods and"
        " spaces; that its constant may be 1 was seen on the validation rows of these very merges. Normalised means on"
        " test rows, beside those of the table above.\n\n"
        + results.table(["merge", "adapters", "auto", "two norms", "tuned"], rows),
        raw,
    )


def _first(numbers: Any, back: Callable[[Any], Curves], bench: Bench) -> str:
    return auto_against_tuned({name: [back(one) for one in listed] for name, listed in numbers.items()}, bench)


def _second(numbers: Any, back: Callable[[Any], Curves], bench: Bench) -> str:
    return rules([(back(a), back(b)) for a, b in numbers], bench)


if __name__ == "__main__":
    main()
