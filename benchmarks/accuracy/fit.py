"""What a few unlabelled inputs buy when the cores are fitted to them: ``python -m benchmarks.accuracy.fit``.

Inputs are drawn without their labels, and from the split that is not scored: scores are of test rows, or of validation
rows where settings are compared. ``--tasks``: another task set; ``--quick``: a few rows, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import results
from benchmarks.accuracy.distill import STEPS, distilled
from benchmarks.accuracy.work import EXAMPLE, QUICK, Bench, bench_of, spread, worst
from coremerge import Recipe, merge
from coremerge.evaluation import Scores
from coremerge.evaluation.taskset import Split
from coremerge.learning import fit, fitting, learn_weights, passes
from coremerge.learning.backbone import Batch
from coremerge.learning.leastsquares import Demand
from coremerge.learning.passes import Passes
from coremerge.learning.stream import Updates
from coremerge.merging import MergeResult

INPUTS, BATCH, SEEDS, RANK = 64, 16, (0, 1, 2), 16
ROWS: dict[Split, int] = {"validation": 200, "test": 400}
TITLE = "Accuracy: fitted cores"
ALONE = math.inf
COUNTS, RIDGES = (8, 16, 64, 256, 1024), (0.3, 1.0)
"""Inputs of a task, and ridges beside what is the default."""
PRIORS = ("merge", "router", "regmean", "zero")
CROSSED: tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]] = (
    ("iso", "merge", "router"), (0.1, 0.3, 1.0, 3.0), (16, 64),
)  # fmt: skip
"""Priors, ridges and numbers of inputs, each with each."""
SUBSETS = {2: SEEDS, 4: SEEDS}
"""Numbers of tasks, and the draws of them."""

Data = dict[str, list[Batch]]


@dataclass(frozen=True)
class Way:
    """A merge that may use inputs.

    Attributes:
        label: what it is called.
        make: from the inputs.
        drawn: whether it is made from each draw of them; else from the first alone.
    """

    label: str
    make: Callable[[Data], MergeResult]
    drawn: bool = True


def inputs(
    bench: Bench,
    seed: int = 0,
    count: int = INPUTS,
    of: Mapping[str, str] | None = None,
    split: Split = "validation",
) -> Data:
    """Task → batches of inputs, drawn by ``seed``; ``of``: task → whose inputs are taken for it."""
    rows = {name: bench.taskset.rows(name, split) for name in bench.taskset.tasks}
    draw = random.Random(seed)
    drawn = {name: draw.sample(rows[name], min(count, len(rows[name]))) for name in rows}
    encoder = bench.evaluator.encoder
    return {name: [batch for _, batch in encoder.batches(drawn[(of or {}).get(name, name)], BATCH)] for name in rows}


def first_batch(data: Data) -> Data:
    """So many of the inputs."""
    return {name: listed[:1] for name, listed in data.items()}


def random_tokens(data: Data, seed: int = 0) -> Data:
    """The same lengths, of tokens without meaning."""
    generator = torch.Generator().manual_seed(seed)

    def scrambled(batch: Batch) -> Batch:
        ids = batch["input_ids"]
        return {**batch, "input_ids": torch.randint(1000, 29000, ids.shape, generator=generator)}

    return {name: [scrambled(batch) for batch in listed] for name, listed in data.items()}


def fitted(bench: Bench, **settings: Any) -> Callable[[Data], MergeResult]:
    """A fit with these settings."""
    return lambda data: fit(bench.evaluator.encoder.model, bench.adapters, data, **settings)


class OwnInputs(Passes):
    """Fits to each task's inputs as the model with that task's adapter has them: one pass would do."""

    def _inputs(self, at: int, task: str, j: int) -> tuple[Mapping[str, Any], Updates]:
        return self._before("own", task, j), self._alone(task, at)


def own_inputs(bench: Bench) -> Callable[[Data], MergeResult]:
    """A fit that does not look at what the merged model does."""

    def make(data: Data) -> MergeResult:
        with patch.object(passes, "Passes", OwnInputs):
            return fitted(bench)(data)

    return make


Weights = Callable[[Mapping[str, Demand], Mapping[str, float]], Mapping[str, float]]


def equal(means: Mapping[str, Demand], preferences: Mapping[str, float]) -> Mapping[str, float]:
    """Large outputs count for more."""
    return dict.fromkeys(means, 1.0)


def over_size(means: Mapping[str, Demand], preferences: Mapping[str, float]) -> Mapping[str, float]:
    """One over what is asked in all directions together."""
    return {task: 1 / demand.size for task, demand in means.items()}


def weighted(bench: Bench, weights: Weights) -> Callable[[Data], MergeResult]:
    """A fit in which the tasks count otherwise."""

    def make(data: Data) -> MergeResult:
        with patch.object(fitting, "weights_of", weights):
            return fitted(bench)(data)

    return make


def twice(bench: Bench) -> Callable[[Data], MergeResult]:
    """A second fit, the first its prior."""
    return lambda data: fitted(bench, prior=fitted(bench)(data).adapter.load())(data)


def learned(bench: Bench, objective: str) -> Callable[[Data], MergeResult]:
    """A weighted sum, its weights learned."""

    def make(data: Data) -> MergeResult:
        with torch.enable_grad():
            weights = learn_weights(bench.evaluator.encoder.model, bench.adapters, data, objective=objective)
        return merge(bench.adapters, Recipe(method="sum", scale=1.0, weights=weights))

    return make


def distillation(bench: Bench) -> Callable[[Data], MergeResult]:
    """The cores trained by gradient: see :mod:`benchmarks.accuracy.distill`."""

    def make(data: Data) -> MergeResult:
        found = distilled(bench.evaluator.encoder.model, bench.adapters, data)
        return merge([found], Recipe(method="sum", scale=1.0, dtype="float32"))

    return make


def without_data(bench: Bench, **recipe: Any) -> Callable[[Data], MergeResult]:
    """A merge of the adapters alone."""

    def make(data: Data) -> MergeResult:
        return merge(bench.adapters, Recipe(**recipe))

    return make


def gradient_ways(bench: Bench) -> list[Way]:
    """What takes minutes each."""
    return [
        *(Way(f"sum, weights learned ({name})", learned(bench, name)) for name in ("nsc-own", "match")),
        Way(f"cores distilled ({STEPS} steps)", distillation(bench)),
    ]


def ways(bench: Bench) -> list[Way]:
    """The rows of the comparison."""
    data_free = {
        "task arithmetic": {"method": "sum"},
        "TSV": {"method": "tsv"},
        "Iso-C": {"method": "sum", "steps": ["isotropize"]},
        "coremerge's default": {},
    }
    listed = [
        Way(f"{name}, no inputs", without_data(bench, **recipe), drawn=False) for name, recipe in data_free.items()
    ]
    small = {"space": f"ctm:rank={RANK}"}
    return [
        *listed,
        Way("RegMean in core space", fitted(bench, prior="regmean", ridge=ALONE)),
        Way("RegMean++ in core space", fitted(bench, prior="regmean++", ridge=ALONE)),
        Way("router (SSR-Merge)", fitted(bench, prior="router", ridge=ALONE)),
        Way("fit, errors alike in all directions", fitted(bench, aside=1.0)),
        Way("fit", fitted(bench)),
        Way(f"fit, {BATCH} inputs a task", lambda data: fitted(bench)(first_batch(data))),
        Way(f"task arithmetic, cut to {RANK}, no inputs", without_data(bench, method="sum", rank=RANK), drawn=False),
        Way(f"coremerge's default, cut to {RANK}, no inputs", without_data(bench, rank=RANK), drawn=False),
        Way(f"CtM with TIES, rank {RANK}, no inputs", without_data(bench, method="ties", **small), drawn=False),
        Way(f"CtM with TSV and isotropize, rank {RANK}, no inputs", without_data(bench, **small), drawn=False),
        Way(f"RegMean++ in core space, cut to {RANK}", fitted(bench, prior="regmean++", ridge=ALONE, rank=RANK)),
        Way(f"router, cut to {RANK}", fitted(bench, prior="router", ridge=ALONE, rank=RANK)),
        Way(f"fit, then cut to {RANK}", lambda data: _cut(fitted(bench)(data))),
        Way(f"fit, rank {RANK}", fitted(bench, rank=RANK)),
        Way(f"fit, rank {RANK}, {BATCH} inputs a task", lambda data: fitted(bench, rank=RANK)(first_batch(data))),
    ]


def _cut(result: MergeResult) -> MergeResult:
    return merge([result.adapter], Recipe(method="sum", scale=1.0, rank=RANK))


def scored(bench: Bench, way: Way, data: Data, split: Split) -> tuple[Scores, float]:
    """Scores of one merge, and the seconds that it took."""
    start = time.perf_counter()
    updates = dict(way.make(data).adapter)
    seconds = time.perf_counter() - start
    sys.stderr.write(f"\r{way.label}: {seconds:.0f} s      ")
    return bench.evaluator.score(updates, split), seconds


def comparison(bench: Bench, seeds: Sequence[int], listed: Sequence[Way]) -> tuple[str, object]:
    """Merges on test rows."""
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    drawn = {seed: inputs(bench, seed) for seed in seeds}
    for way in listed:
        found = [scored(bench, way, drawn[seed], "test") for seed in (seeds if way.drawn else seeds[:1])]
        scores, seconds = [one for one, _ in found], [taken for _, taken in found]
        lowest = min(scores, key=lambda one: min(one.normalised.values()))
        rows.append(
            [way.label, spread([one.mean for one in scores]), worst(lowest), f"{statistics.fmean(seconds):.0f}"]
        )
        raw[way.label] = {"scores": [dict(one.normalised) for one in scores], "seconds": seconds}
    text = (
        f"Normalised means on {bench.rows['test']} test rows a task of {bench.taskset.name} with {INPUTS} unlabelled"
        f" inputs of each task, {len(seeds)} draws; scales automatic, no labels anywhere. Worst: of all draws. Seconds"
        " as they passed, beside other work.\n\n"
    )
    return text + results.table(["merge", "score", "worst task", "seconds"], rows), raw


def choices(bench: Bench, most: int) -> tuple[str, object]:
    """What decides quality, on validation rows."""
    drawn = {count: inputs(bench, count=count, split="test") for count in COUNTS if count <= most}
    data = drawn[INPUTS]
    names = list(bench.taskset.tasks)
    turned = dict(zip(names, names[1:] + names[:1], strict=True))
    tried: list[tuple[str, Callable[[Data], MergeResult], Data]] = [
        *((f"{count} inputs a task", fitted(bench), given) for count, given in drawn.items()),
        *(
            (f"{count} inputs a task, ridge {ridge:g}", fitted(bench, ridge=ridge), drawn[count])
            for count in COUNTS[:3]
            for ridge in RIDGES
        ),
        *((f"prior {prior}", fitted(bench, prior=prior), data) for prior in PRIORS),
        ("errors alike in all directions", fitted(bench, aside=1.0), data),
        ("weights: equal, so that large outputs count for more", weighted(bench, equal), data),
        ("weights: one over the demand in all directions", weighted(bench, over_size), data),
        ("one pass: inputs as the tasks' own models have them", own_inputs(bench), data),
        ("two fits, the first the second's prior", twice(bench), data),
        (f"rank {RANK}", fitted(bench, rank=RANK), data),
        (f"rank {RANK} on average (--rank-budget)", fitted(bench, rank_budget=RANK), data),
        ("inputs of another task", fitted(bench), inputs(bench, of=turned, split="test")),
        ("random tokens", fitted(bench), random_tokens(data)),
    ]
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for label, make, given in tried:
        scores, seconds = scored(bench, Way(label, make), given, "validation")
        rows.append([label, f"{scores.mean:.3f}", worst(scores), f"{seconds:.0f}"])
        raw[label] = {"scores": dict(scores.normalised), "seconds": seconds}
    text = (
        f"Normalised means on {bench.rows['validation']} validation rows a task of {bench.taskset.name}, one draw of"
        f" {INPUTS} test inputs a task unless it is said; all else as it is by default.\n\n"
    )
    return text + results.table(["fit", "score", "worst task", "seconds"], rows), raw


def crossed(bench: Bench, seeds: Sequence[int]) -> tuple[str, object]:
    """Prior, ridge and number of inputs, each with each, on validation rows."""
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    priors, ridges, counts = CROSSED
    for count in counts:
        drawn = [inputs(bench, seed, count, split="test") for seed in seeds]
        for prior in priors:
            means = []
            for ridge in ridges:
                way = Way(f"{count} inputs, prior {prior}, ridge {ridge:g}", fitted(bench, prior=prior, ridge=ridge))
                found = [scored(bench, way, data, "validation")[0] for data in drawn]
                raw[way.label] = [dict(one.normalised) for one in found]
                means.append(spread([one.mean for one in found]))
            rows.append([count, prior, *means])
    text = (
        f"Normalised means on {bench.rows['validation']} validation rows a task of {bench.taskset.name}, {len(seeds)}"
        " draws of test inputs.\n\n"
    )
    return text + results.table(["inputs", "prior", *(f"ridge {ridge:g}" for ridge in ridges)], rows), raw


def subsets(bench: Bench, sizes: Mapping[int, Sequence[int]]) -> tuple[str, object]:
    """Fewer tasks, adapters of one kind, on test rows."""
    names = list(bench.taskset.tasks)
    parts = {
        f"{size} tasks": [
            sorted(random.Random(1000 * size + seed).sample(names, size), key=names.index) for seed in seeds
        ]
        for size, seeds in sizes.items()
        if size < len(names)
    }
    configs = {
        name: json.loads((path / "adapter_config.json").read_text()) for name, path in bench.taskset.own().items()
    }
    vera = [name for name in names if configs[name]["peft_type"] == "VERA"]
    if vera:
        parts[f"all but {', '.join(vera)}, whose adapters are VeRA"] = [[name for name in names if name not in vera]]
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for label, listed in parts.items():
        found: dict[str, list[Scores]] = {"default": [], "fit": [], "rank": []}
        for some in map(bench.only, listed):
            data = inputs(some)
            made = without_data(some), fitted(some), fitted(some, rank=RANK)
            for key, make in zip(found, made, strict=True):
                found[key].append(scored(some, Way(label, make), data, "test")[0])
        means = {key: [one.mean for one in scores] for key, scores in found.items()}
        lowest = min(found["fit"], key=lambda one: min(one.normalised.values()))
        rows.append([label, len(listed), *(f"{statistics.fmean(x):.3f}" for x in means.values()), worst(lowest)])
        raw[label] = {"tasks": listed, **means}
    text = (
        f"Normalised means on {bench.rows['test']} test rows a task of {bench.taskset.name}, one draw of {INPUTS}"
        " unlabelled inputs of each task; means of several draws of tasks.\n\n"
    )
    head = ["tasks", "draws", "coremerge's default, no inputs", "fit", f"fit, rank {RANK}", "worst task of the fit"]
    return text + results.table(head, rows), raw


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="another task set")
    parser.add_argument("--quick", action="store_true", help="a few rows; results go to the work folder")
    parser.add_argument(
        "--only", choices=["comparison", "gradient", "choices", "crossed", "subsets"], help="one of the tables"
    )
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="inputs of a task, where their number is varied")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    bench = bench_of(parser, given.tasks, QUICK if given.quick else ROWS)
    if given.quick:
        bench = bench.only(list(bench.taskset.tasks)[:2])
    name = bench.taskset.name
    if given.only in (None, "comparison"):
        seeds = SEEDS[:1] if given.quick else SEEDS
        results.write(f"{TITLE}, {name}", *comparison(bench, seeds, ways(bench)), seed=0, folder=folder)
    if given.only in (None, "gradient"):
        found = comparison(bench, SEEDS[:1] if given.quick else SEEDS, gradient_ways(bench))
        results.write(f"{TITLE}: by gradient, {name}", *found, seed=0, folder=folder)
    if given.only in (None, "subsets"):
        sizes = {} if given.quick else SUBSETS
        results.write(f"{TITLE}: fewer tasks, {name}", *subsets(bench, sizes), seed=0, folder=folder)
    if given.only in (None, "crossed"):
        found = crossed(bench, SEEDS[:1] if given.quick else SEEDS[:2])
        results.write(f"{TITLE}: prior and ridge, {name}", *found, seed=0, folder=folder)
    if given.only in (None, "choices"):
        results.write(f"{TITLE}: what decides, {name}", *choices(bench, given.most), seed=0, folder=folder)


if __name__ == "__main__":
    main()
