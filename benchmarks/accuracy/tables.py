"""Merges of a task set's adapters beside each other: ``python -m benchmarks.accuracy.tables``.

Methods × spaces at their defaults and tuned; fewer adapters; controls; lower output ranks. Tuned on validation rows,
scored on test rows. ``--short``: fewer rows and merges, in minutes. ``--quick``: a few rows, to see that it runs.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.accuracy.work import EXAMPLE, QUICK, ROWS, SHORT, Bench, bench_of, spread, worst
from coremerge import LowRank, Recipe
from coremerge.evaluation import Scores
from coremerge.evaluation.plan import Merge, Plan, make_plan
from coremerge.evaluation.search import Tuned, search
from coremerge.lowrank import ThinSVD

SEEDS = range(3)
BOTH: list[list[str]] = [[], ["isotropize"]]
SPACES = ["full", "knots", "core"]
DENSITIES, DROPS, RANKS = [0.2, 0.1, 0.3], [0.5, 0.1, 0.9], [8, 4, 16]
GRID: list[dict[str, Any]] = [
    {"merge_method": "sum", "label": "task arithmetic"},
    {"merge_method": "ties", "space": SPACES, "steps": BOTH, "parameters": {"density": DENSITIES}},
    {
        "merge_method": "dare_ties", "space": SPACES, "steps": BOTH,
        "parameters": {"drop_rate": DROPS, "density": DENSITIES},
    },
    {"merge_method": "tsv", "steps": BOTH},
    {"merge_method": "cart", "steps": BOTH, "parameters": {"rank": RANKS}},
    {"merge_method": "sum", "steps": ["isotropize"], "label": "sum"},
    {"merge_method": "tsv", "space": "full", "parameters": {"pad": True}, "label": "tsv, null vectors kept"},
    {
        "merge_method": "tsv", "space": "full", "steps": ["isotropize:span=false"], "parameters": {"pad": True},
        "label": "tsv, null vectors kept",
    },
    {"merge_method": "sum", "space": "full", "steps": ["isotropize:span=false"], "label": "sum"},
    {"merge_method": "tsv", "steps": ["isotropize"], "parameters": {"rank": [4]}, "label": "tsv of 4 directions"},
    {"label": "coremerge's default"},
]  # fmt: skip
"""Methods that do not see the basis give the same in all spaces at the true rank: those have one row, in core."""

FEW = ["core task arithmetic", "core ties", "core tsv", "core sum + isotropize", "core tsv + isotropize",
       "core coremerge's default"]  # fmt: skip
"""Merges that are compared for fewer adapters, and for lower output ranks."""

BUDGET = 14
OUTPUT_RANKS = ["exact", 64, 32, 16, 8]
Section = tuple[str, object]


def grid(labels: Sequence[str] | None = None) -> Plan:
    """Those of :data:`GRID`, parameters one after the other at the best scale."""
    plan = make_plan(GRID, order="coordinate", budget=BUDGET)
    kept = tuple(one for one in plan.merges if labels is None or one.label in labels)
    return plan.model_copy(update={"merges": kept})


def untuned(merge: Merge) -> Recipe:
    """The first of all values, and the automatic scale."""
    from coremerge.evaluation.plan import recipe_of

    return recipe_of(merge, {key: values[0] for key, values in merge.tried.items()})


def spaces(bench: Bench, labels: Sequence[str] | None = None) -> Section:
    """Every method in every space."""
    plan = grid(labels)
    tuned = search(bench.evaluator, bench.adapters, plan, progress=tell)
    rows: list[list[object]] = [
        ["each task's own adapter", *_cells([bench.evaluator.own("test")]), "", "", "", ""],
        ["no adapter", *_cells([bench.evaluator.score({}, "test", intervals=True)]), "", "", "", ""],
    ]
    raw: dict[str, Any] = {}
    for merge, best in zip(plan.merges, tuned, strict=True):
        plain, seconds = _untuned(bench, merge)
        chosen = [best.scores, *_reseeded(bench, best)]
        rows.append([merge.label, *_cells(plain), *_cells(chosen)[1:3], _settings(best), f"{seconds:.2f}"])
        scored = {"untuned": [s.to_dict() for s in plain], "tuned": [s.to_dict() for s in chosen]}
        raw[merge.label] = scored | {"seconds": seconds} | best.to_dict()
        print(rows[-1], flush=True)
    header = ["merge", "untuned: raw", "normalised", "worst task", "tuned: normalised", "worst task", "tuned at", "s"]
    count = len(bench.adapters)
    margin = max(best.scores.margin for best in tuned)
    return (
        f"{count} adapters of {bench.taskset.name}, ranks {_ranks(bench)}; {_rows(bench)}. Untuned: default"
        " parameters, scale auto. Tuned: scale by factors of √2 from there, then parameters one by one (at most"
        f" {BUDGET} validation scores each). dare: mean ± standard deviation over {len(SEEDS)} seeds. By the test rows'"
        f" counts alone a normalised mean is uncertain by ±{margin:.3f} (95 %); differences between merges on the same"
        " rows by less. Methods that do not depend on the basis (sum, tsv, cart) are the same in full, knots and core"
        ' space at the true rank; "null vectors kept" and `span=false` are the full-space code as published. s: the'
        " merge alone.\n\n" + results.table(header, rows) + "\n\n" + _joint(bench, plan, tuned),
        raw,
    )


def _untuned(bench: Bench, merge: Merge) -> tuple[list[Scores], float]:
    recipe = untuned(merge)
    seeds = SEEDS if recipe.method.startswith("dare") else SEEDS[:1]
    merged = [bench.merged(recipe.model_copy(update={"seed": seed})) for seed in seeds]
    return [bench.score(one) for one in merged], statistics.fmean(one.result.report.seconds for one in merged)


def _reseeded(bench: Bench, best: Tuned) -> list[Scores]:
    """The other seeds of a method that draws."""
    if not best.recipe.method.startswith("dare"):
        return []
    return [bench.score(bench.merged(best.recipe.model_copy(update={"seed": seed}))) for seed in SEEDS[1:]]


def _cells(scores: Sequence[Scores]) -> list[str]:
    lowest = min(scores, key=lambda s: min(s.normalised.values()))
    return [spread([s.mean_raw for s in scores]), spread([s.mean for s in scores]), worst(lowest)]


def _settings(best: Tuned) -> str:
    chosen = {key.removeprefix("recipe."): value for key, value in best.parameters.items()}
    return ", ".join([f"scale {float(best.recipe.scale):.3g}", *(f"{key} {value}" for key, value in chosen.items())])


def _joint(bench: Bench, plan: Plan, tuned: Sequence[Tuned]) -> str:
    groups = bench.taskset.joint
    if not groups:
        return ""
    rows = [[best.label, *(f"{best.scores.joint[group]:.3f}" for group in groups)] for best in tuned]
    nothing = bench.evaluator.score({}, "test")
    rows.insert(0, ["no adapter", *(f"{nothing.joint[group]:.3f}" for group in groups)])
    named = "; ".join(f"{group}: {' and '.join(names)}" for group, names in groups.items())
    return (
        f"The task of a row unknown, all labels of the group to choose from ({named}): accuracy of the tuned merges,"
        " which were tuned for the average above.\n\n" + results.table(["merge", *groups], rows)
    )


def how_many(bench: Bench) -> Section:
    """Two adapters, four, and all."""
    names, rows, raw = list(bench.adapters), [], {}
    for count in (2, 4):
        found: dict[str, list[tuple[Scores, Tuned]]] = {}
        for seed in SEEDS:
            part = bench.only(sorted(random.Random(1000 * count + seed).sample(names, count), key=names.index))
            plan = grid(FEW)
            tuned = search(part.evaluator, part.adapters, plan, progress=tell)
            for merge, best in zip(plan.merges, tuned, strict=True):
                found.setdefault(merge.label, []).append((_untuned(part, merge)[0][0], best))
        for label, listed in found.items():
            means = [[plain.mean for plain, _ in listed], [best.scores.mean for _, best in listed]]
            lowest = min(min(best.scores.normalised.values()) for _, best in listed)
            rows.append([count, label, *(spread(values) for values in means), f"{lowest:.3f}"])
            raw[f"{count}: {label}"] = [{"untuned": p.to_dict(), "tuned": b.to_dict()} for p, b in listed]
            print(rows[-1], flush=True)
    header = ["adapters", "merge", "untuned", "tuned", "tuned: worst task"]
    return (
        f"Subsets of {bench.taskset.name}'s tasks, {len(SEEDS)} draws of each size, normalised, mean ± standard"
        f" deviation over draws; {_rows(bench)}; otherwise as above, where all {len(names)} are.\n\n"
        + results.table(header, rows),
        raw,
    )


def controls(bench: Bench) -> Section:
    """What a merge has to be better than."""
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}

    def add(label: str, listed: Sequence[Scores]) -> None:
        rows.append([label, *_cells(listed)])
        raw[label] = [scores.to_dict() for scores in listed]
        print(rows[-1], flush=True)

    add("no adapter", [bench.evaluator.score({}, "test")])
    for name, adapter in bench.adapters.items():
        add(f"{name} alone", [bench.evaluator.score(adapter, "test")])
    for label, recipe in (("task arithmetic", Recipe(method="sum")), ("the default", Recipe())):
        add(f"{label}, untuned", [bench.score(bench.merged(recipe))])
        made = [Bench(bench.taskset, random_like(bench, seed), bench.rows) for seed in SEEDS]
        add(f"{label} of random adapters, untuned", [bench.score(one.merged(recipe)) for one in made])
    return (
        f"Scores over all {len(bench.adapters)} tasks of {bench.taskset.name}, {_rows(bench)}. Random adapters: each"
        " module's singular values, in random directions, so that a merge of them changes the weights as much;"
        f" {len(SEEDS)} seeds. Scale alone is task arithmetic tuned, in the table above.\n\n"
        + results.table(["what", "raw", "normalised", "worst task"], rows),
        raw,
    )


def random_like(bench: Bench, seed: int) -> dict[str, Any]:
    """Adapters with the spectra of the set's, in random directions."""
    from coremerge import Adapter

    generator = torch.Generator().manual_seed(seed)

    def directions(size: int, count: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q

    def turned(update: LowRank) -> LowRank:
        values = update.svd.values
        (m, n), k = update.shape, len(values)
        return ThinSVD(directions(m, k), values, directions(n, k).mT).lowrank()

    return {
        name: Adapter.from_updates({module: turned(adapter[module]) for module in adapter}, name=name)
        for name, adapter in bench.adapters.items()
    }


def output_rank(bench: Bench) -> Section:
    """What a lower rank of the result costs."""
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for merge in grid(["core task arithmetic", "core tsv", "core tsv + isotropize", "core coremerge's default"]).merges:
        for rank in OUTPUT_RANKS:
            merged = bench.merged(untuned(merge).model_copy(update={"rank": rank}))
            report = merged.result.report
            scores = bench.score(merged)
            rows.append([merge.label, str(rank), report.rank, f"{report.lost:.1%}", *_cells([scores])[1:]])
            raw[f"{merge.label}, {rank}"] = scores.to_dict() | {"lost": report.lost, "rank": report.rank}
            print(rows[-1], flush=True)
    header = ["merge", "--rank", "rank", "energy lost", "normalised", "worst task"]
    return (
        f"All {len(bench.adapters)} adapters, untuned, cut to a rank; scale auto is found before the cut;"
        f" {_rows(bench)}.\n\n" + results.table(header, rows),
        raw,
    )


def _ranks(bench: Bench) -> str:
    found = sorted({module.rank for adapter in bench.adapters.values() for module in adapter.modules.values()})
    return ", ".join(map(str, found))


def _rows(bench: Bench) -> str:
    return f"{bench.rows['validation']} validation and {bench.rows['test']} test rows a task"


def tell(label: str, done: int, count: int) -> None:
    print(f"\r{done}/{count} {label}   ", end="", flush=True)


SECTIONS: Mapping[str, tuple[str, Callable[[Bench], Section]]] = {
    "spaces": ("Accuracy: methods and spaces", spaces),
    "count": ("Accuracy: fewer adapters", how_many),
    "controls": ("Accuracy: controls", controls),
    "rank": ("Accuracy: output rank", output_rank),
}


def sections(only: str | None) -> Iterator[tuple[str, Callable[[Bench], Section]]]:
    yield from (SECTIONS[key] for key in SECTIONS if only in (None, key))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="another task set")
    parser.add_argument("--short", action="store_true", help="fewer rows and merges; results go to the work folder")
    parser.add_argument("--quick", action="store_true", help="a few rows; results go to the work folder")
    parser.add_argument("--only", choices=SECTIONS, help="one of the tables")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    bench = bench_of(parser, given.tasks, QUICK if given.quick else SHORT if given.short else ROWS)
    folder = given.results or (Path("work/bench") if given.quick or given.short else results.ROOT)
    for title, part in sections(given.only):
        body, raw = spaces(bench, FEW) if part is spaces and given.short else part(bench)
        named = title if given.tasks == EXAMPLE else f"{title}, {bench.taskset.name}"
        results.write(named, body, raw, seed=0, folder=folder)


if __name__ == "__main__":
    main()
