"""What a merge looks like: ``python -m benchmarks.accuracy.geometry``.

Scores while components are discarded; the subspace alignment of tasks and merge, in full space and in core; and how far
embeddings move from each task's own. ``--quick``: a few rows, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.accuracy.compression import spearman
from benchmarks.accuracy.tables import grid, tell, untuned
from benchmarks.accuracy.work import EXAMPLE, QUICK, Bench, Merged, bench_of
from coremerge import LowRank, Recipe
from coremerge.diagnostics.alignment import align, align_module, subspace
from coremerge.evaluation.taskset import Split
from coremerge.lowrank import thin_svd

ROWS: dict[Split, int] = {"validation": 6, "test": 200}
SHARES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]
CUT = ["core task arithmetic", "core tsv", "core sum + isotropize", "core tsv + isotropize", "core coremerge's default"]
NEAR = ["core task arithmetic", "full ties", "core ties", "core tsv", "core tsv + isotropize",
        "full tsv, null vectors kept + isotropize:span=false", "core sum + isotropize",
        "core coremerge's default"]  # fmt: skip
Section = tuple[str, object]


def merges(bench: Bench, labels: Sequence[str]) -> dict[str, Merged]:
    """At default parameters and the automatic scale."""
    plan = grid(labels)
    assert {merge.label for merge in plan.merges} == set(labels), [merge.label for merge in plan.merges]
    return {merge.label: bench.merged(untuned(merge)) for merge in plan.merges}


def without(updates: Mapping[str, LowRank], share: float) -> dict[str, LowRank]:
    """Each module without ``share`` of its components, the smallest."""
    return {name: update.truncate(round((1 - share) * update.rank)) for name, update in updates.items()}


def discarded(bench: Bench) -> Section:
    """Scores over the share of components that are left out."""
    found: dict[str, dict[str, float]] = {}
    for label, merged in merges(bench, CUT).items():
        tell(label, len(found), len(CUT))
        found[label] = {
            str(share): bench.evaluator.score(without(merged.updates, share), "test").mean for share in SHARES
        }
    first = next(iter(bench.adapters.values()))
    name = next(iter(first))
    total = sum(adapter[name].rank for adapter in bench.adapters.values() if name in adapter)
    size = min(first[name].shape)
    rows = [[label, *(f"{score:.3f}" for score in scores.values())] for label, scores in found.items()]
    return (
        f"All {len(bench.adapters)} adapters of {bench.taskset.name}, untuned; normalised mean on"
        f" {bench.rows['test']} test rows a task, without the smallest share p of each module's components."
        f" Components are those of the core, as many as the ranks add up to ({total} in {name}). In full space the same"
        f" merge has {size} singular values, all others zero: what is p here is 1 - {total}/{size} · (1 - p) there, and"
        " the curves are one.\n\n" + results.table(["merge", *(f"p = {share:g}" for share in SHARES)], rows),
        {"scores": found, "core": total, "full": size},
    )


def alignment(bench: Bench) -> Section:
    """Subspace alignment ratios, from m × n matrices and from cores."""
    merged = bench.merged(Recipe(method="sum"))
    core = align(bench.adapters)
    names = list(bench.adapters)
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for i, name in enumerate(names):
        others = [j for j in range(len(names)) if j != i]
        values = [
            statistics.fmean(dense_ratio(bench.adapters[name], bench.adapters[names[j]]) for j in others),
            statistics.fmean(float(core.ratio[i, j]) for j in others),
            dense_ratio(bench.adapters[name], merged.updates),
            core_ratio(bench.adapters[name], merged.updates),
        ]
        rows.append([name, *(f"{value:.4f}" for value in values)])
        raw[name] = dict(zip(("others, full", "others, core", "merge, full", "merge, core"), values, strict=True))
        tell(name, i, len(names))
    header = ["task", "others: full", "others: core", "merge: full", "merge: core"]
    return (
        f"Of each adapter of {bench.taskset.name}: the share of its norm that lies in the span of another's leading"
        " left singular vectors (the fewest whose cumulative energy has a square root above 0.95), mean over modules"
        " and over the other adapters; and in the span of their sum's. Full: from m × n matrices by dense SVD; core:"
        " from cores. The bases are orthonormal, so that both are the same number: a merge in core space is no better"
        " aligned for being there.\n\n" + results.table(header, rows),
        raw,
    )


def dense_ratio(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Mean over shared modules, from the definition."""
    found = []
    for module in one.keys() & other.keys():
        span = subspace(thin_svd(other[module].dense().double()))
        dense = one[module].dense().double()
        found.append(float((span.mT @ dense).norm() / dense.norm()))
    return statistics.fmean(found)


def core_ratio(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """The same from cores."""
    shared = one.keys() & other.keys()
    return statistics.fmean(
        float(align_module({"one": one[module], "other": other[module]}).ratio[0, 1]) for module in shared
    )


def distance(bench: Bench) -> Section:
    """Mean absolute difference of embeddings from the task's own adapter's."""
    own = {name: bench.evaluator.embeddings(adapter, "test")[name] for name, adapter in bench.adapters.items()}
    listed: dict[str, Mapping[str, LowRank]] = {"no adapter": {}}
    listed |= {label: merged.updates for label, merged in merges(bench, NEAR).items()}
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for label, updates in listed.items():
        tell(label, len(rows), len(listed))
        now = bench.evaluator.embeddings(updates, "test")
        moved = {name: float((now[name] - own[name]).abs().mean()) for name in own}
        scores = bench.evaluator.score(updates, "test").normalised
        raw[label] = {"distance": moved, "score": dict(scores)}
        means = (statistics.fmean(values) for values in (moved.values(), scores.values()))
        rows.append([label, *(f"{value:.4f}" for value in moved.values()), *(f"{value:.3f}" for value in means)])
    across = {
        name: spearman([x["distance"][name] for x in raw.values()], [x["score"][name] for x in raw.values()])
        for name in own
    }
    rows.append(["Spearman with the score", *(f"{value:.2f}" for value in across.values()), "", ""])
    size = statistics.fmean(float(x.abs().mean()) for x in own.values())
    return (
        f"Mean absolute difference of the embeddings of {bench.rows['test']} test rows a task between a merge, untuned,"
        f" and the task's own adapter; the embeddings' own entries are {size:.3f} in the mean. Last row: over the"
        " merges above, its rank correlation with the task's score.\n\n"
        + results.table(["merge", *own, "mean", "score"], rows),
        raw,
    )


SECTIONS: Mapping[str, tuple[str, Callable[[Bench], Section]]] = {
    "discarded": ("Accuracy: discarded components", discarded),
    "alignment": ("Accuracy: subspace alignment", alignment),
    "distance": ("Accuracy: distance of embeddings", distance),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="another task set")
    parser.add_argument("--quick", action="store_true", help="a few rows; results go to the work folder")
    parser.add_argument("--only", choices=SECTIONS, help="one of the tables")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    bench = bench_of(parser, given.tasks, QUICK if given.quick else ROWS)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    for key, (title, part) in SECTIONS.items():
        if given.only in (None, key):
            body, raw = part(bench)
            results.write(title, body, raw, seed=0, folder=folder)


if __name__ == "__main__":
    main()
