"""Everything that coremerge offers, on any task set: ``python -m benchmarks.accuracy.worlds --tasks examples/vision``.

Each way to merge, at 2, 4, 8 and all adapters and several draws: as it comes, at a scale that is tuned on validation
rows, with weights or cores learned from unlabelled inputs. Test rows are scored once for each. Nothing here knows a
world's name: what differs stands in its ``tasks.yaml``.

A row is kept (``work/bench/worlds/NAME-ROWS.jsonl``) as soon as it is scored, and a run that was stopped goes on where
it was, from that file or from the rows in results.json that were scored on as many rows a task; each has its day.
``--fresh`` begins anew. ``--only`` takes some of the ways; ``--quick``: a few rows and steps, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.accuracy.tables import GRID, untuned
from benchmarks.accuracy.work import EXAMPLE, QUICK, Bench, Merged, bench_of, kind_of
from coremerge import Recipe
from coremerge.evaluation import Evaluator, Scores
from coremerge.evaluation.plan import make_plan
from coremerge.evaluation.scales import Scales, walk
from coremerge.evaluation.scorer import Scored
from coremerge.evaluation.taskset import Split, Task, TaskSet
from coremerge.evaluation.unlabelled import read_unlabelled
from coremerge.learning import answered_batches, fit, learn_weights
from coremerge.learning.backbone import Batch
from coremerge.learning.own_answers import answering
from coremerge.learning.rows import Example
from coremerge.learning.settings import settle

ROWS: dict[Split, int] = {"validation": 100, "test": 300}
"""A task, unless the command says otherwise."""
COUNTS = (2, 4, 8)
"""Numbers of adapters beside all of them."""
DRAWS, INPUTS = 3, 64
BATCH = {"weights": 4, "fit": 16}
"""Inputs that go together; a step of a descent sees one batch a task, sums over inputs do not depend on it."""
WORK = Path("work/bench/worlds")
PROBE = "probe.safetensors"
"""Beside a head: one that was learned on the base without an adapter."""

BOUNDS = ("own adapters", "no adapter", "no adapter, probes")
"""Rows that no merge makes."""

AHEAD = {
    "isotropize": Recipe(method="sum", steps=["isotropize"]),
    "tsv": Recipe(method="tsv"),
    "ties": Recipe(method="ties"),
}
"""Core methods that learned weights are put before."""


def share(scores: Scores, task: str) -> float:
    """A task's normalised score, not below 0: an R² far below it would drown every other task in a mean."""
    return max(0.0, scores.normalised[task])


def mean(scores: Scores) -> float:
    """Over tasks; what scales are tuned for."""
    return statistics.fmean(share(scores, task) for task in scores.normalised)


def pool(taskset: TaskSet, name: str) -> list[Example]:
    """A task's inputs without labels: those that it names, and those of its validation rows."""
    task = taskset.tasks[name]
    labelled = taskset.model_copy(update={"tasks": {name: task.model_copy(update={"unlabelled": None})}})
    return [*(read_unlabelled(taskset, name) if task.unlabelled else ()), *read_unlabelled(labelled, name)]


@dataclass(frozen=True)
class Cell:
    """Some of a world's adapters, one draw of them and of the inputs.

    Attributes:
        bench: of these tasks alone.
        seed: of the draw.
        quick: few steps.
    """

    bench: Bench
    seed: int
    quick: bool = False
    known: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """Weights that were learned already."""

    @property
    def count(self) -> int:
        """Of adapters."""
        return len(self.bench.adapters)

    @cached_property
    def inputs(self) -> dict[str, list[Example]]:
        """Task → inputs of rows that are not test rows, drawn by the seed; labels stay behind."""
        draw, found = random.Random(self.seed), {}
        for name in self.bench.adapters:
            known = pool(self.bench.taskset, name)
            found[name] = draw.sample(known, min(BATCH["weights"] if self.quick else INPUTS, len(known)))
        return found

    def batches(self, size: int) -> dict[str, list[Batch]]:
        """Task → its inputs, ``size`` at a time."""
        placed = self.bench.evaluator.encoder.placed
        return {name: [batch for _, batch in placed(chosen, size)] for name, chosen in self.inputs.items()}

    def merged(self, recipe: Recipe) -> Merged:
        """Also of adapters that share no module, as a draw may have them."""
        return self.bench.merged(recipe.but(allow_disjoint=True))

    def learned(self, **settings: Any) -> dict[str, Any]:
        """Weights as a recipe takes them; what is put before several methods is learned once."""
        key = repr(sorted(settings.items()))
        if key not in self.known:
            self.known[key] = self._learned(**settings)
        return self.known[key]

    def _learned(self, **settings: Any) -> dict[str, Any]:
        if self.quick:
            settings["steps"] = 2
        if settings.get("objective") == "entropy":
            settings["heads"] = self.bench.evaluator.classifiers()
        model = self.bench.evaluator.encoder.model
        with torch.enable_grad():
            data = self.batches(BATCH["weights"])
            return dict(learn_weights(model, self.bench.adapters, data, seed=self.seed, **settings))

    @property
    def answers(self) -> bool:
        """Whether some of its adapters answer their inputs."""
        return bool(answering(self.bench.adapters, self.inputs))

    def fitted(self, *, answered: bool | None = None, **settings: Any) -> Mapping[str, Any]:
        """Updates of a fit, to the adapters' own answers where they give some, unless ``answered`` is False."""
        model, answered = self.bench.evaluator.encoder.model, self.answers if answered is None else answered
        data = self._answered if answered else self.batches(BATCH["fit"])
        settings |= {"answered": answered, "allow_disjoint": True}
        return dict(fit(model, self.bench.adapters, data, **settings).adapter)

    @cached_property
    def _answered(self) -> dict[str, list[Batch]]:
        encoder, adapters = self.bench.evaluator.encoder, self.bench.adapters
        return answered_batches(encoder.model, adapters, self.inputs, encoder.processor, size=BATCH["fit"])


Updates = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to merge.

    Attributes:
        label: of its row.
        make: the updates, and the scale that they have.
        tuned: also at the best scale by validation rows.
        everywhere: for fewer adapters, too; otherwise for all alone.
        draws: makes something else of each draw, also where all adapters are merged.
        classes: needs a task of classification.
        answers: needs adapters that answer.
    """

    label: str
    make: Callable[[Cell], tuple[Updates, float]]
    tuned: bool = False
    everywhere: bool = False
    draws: bool = False
    classes: bool = False
    answers: bool = False


def of_recipe(recipe: Recipe) -> Callable[[Cell], tuple[Updates, float]]:
    """A merge without data."""

    def make(cell: Cell) -> tuple[Updates, float]:
        merged = cell.merged(recipe.but(seed=cell.seed))
        return merged.updates, merged.result.report.scale

    return make


def at_start(cell: Cell) -> tuple[Updates, float]:
    """A plain sum at the weight of all adapters at which learned ones start."""
    scale = settle("nsc", None, {}, cell.count).start
    assert scale is not None
    return cell.merged(Recipe(method="sum", scale=scale)).updates, scale


def of_weights(recipe: Recipe, **settings: Any) -> Callable[[Cell], tuple[Updates, float]]:
    """Weights that are learned, then a merge."""

    def make(cell: Cell) -> tuple[Updates, float]:
        merged = cell.merged(recipe.but(weights=cell.learned(**settings)))
        return merged.updates, merged.result.report.scale

    return make


def of_fit(**settings: Any) -> Callable[[Cell], tuple[Updates, float]]:
    """Cores fitted to the inputs."""
    return lambda cell: (cell.fitted(**settings), 1.0)


def ways() -> Iterator[Way]:
    """All of them: published merges, learned weights, fits."""
    few = {"core task arithmetic", "core ties", "core tsv", "core sum + isotropize", "core tsv + isotropize",
           "core cart", "core tsv of 4 directions + isotropize", "core coremerge's default"}  # fmt: skip
    for merge in make_plan(GRID).merges:
        drawn = str(merge.recipe.get("method", "")).startswith("dare")
        yield Way(merge.label, of_recipe(untuned(merge)), tuned=True, everywhere=merge.label in few, draws=drawn)
    equal, own = Recipe(method="sum", norms="equal"), Recipe(norms="own")
    yield Way("core task arithmetic, norms made equal", of_recipe(equal), tuned=True, everywhere=True)
    yield Way("core coremerge's default, norms as they are", of_recipe(own), tuned=True, everywhere=True)
    for label, recipe in (("core task arithmetic", Recipe(method="sum", scale="base")),
                          ("core tsv + isotropize", Recipe(method="tsv", steps=["isotropize"], scale="base")),
                          ("core coremerge's default", Recipe(scale="base"))):  # fmt: skip
        yield Way(f"{label}, scale by the base", of_recipe(recipe), everywhere=True)
    summed = Recipe(method="sum", scale=1.0)
    yield Way("task arithmetic at the start of learned weights", at_start, everywhere=True)
    for objective in ("nsc", "nsc-own", "match"):
        yield Way(f"weights: {objective}", of_weights(summed, objective=objective), draws=True)
    entropy = of_weights(summed, objective="entropy", modules="all")
    yield Way("weights: entropy (AdaMerging; classification alone)", entropy, draws=True, classes=True)
    for label, recipe in AHEAD.items():
        yield Way(f"weights: nsc, then {label}", of_weights(recipe, objective="nsc"), draws=True)
    yield Way("fit", of_fit(), everywhere=True, draws=True)
    yield Way("fit, rank 16", of_fit(rank=16), everywhere=True, draws=True)
    yield Way("fit, prompts alone", of_fit(answered=False), everywhere=True, draws=True, answers=True)


@dataclass
class Journal:
    """Rows that are scored already, one JSON object a line.

    Attributes:
        scored: validation and test rows a task, at most; what was scored on others is not taken over.
    """

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    scored: tuple[int, int] = (ROWS["validation"], ROWS["test"])

    @classmethod
    def open(
        cls,
        path: Path,
        known: Mapping[str, dict[str, Any]] | None = None,
        *,
        fresh: bool = False,
        scored: tuple[int, int] = (ROWS["validation"], ROWS["test"]),
    ) -> Journal:
        """What an earlier run left there, or published (``known``), or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and not fresh else []
        known = {key: row for key, row in (known or {}).items() if tuple(row["rows"]) == scored}
        rows = {} if fresh else known | {row["key"]: row for row in map(json.loads, lines)}
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()), encoding="utf-8")
        return cls(path, rows, scored)

    def keep(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """``make`` a row, unless it is there."""
        if key in self.rows:
            return
        start = time.perf_counter()
        row = {"key": key, **make(), "took": round(time.perf_counter() - start, 1), "day": date.today().isoformat()}
        row["rows"] = list(self.scored)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[key] = row
        print(key, f"{row['mean']:.3f}", f"{row['took']} s", flush=True)


def measured(scores: Scores, **more: Any) -> dict[str, Any]:
    """One line's numbers."""
    return {"mean": mean(scores), "raw": dict(scores.raw), "normalised": dict(scores.normalised), **more}


def score(cell: Cell, way: Way) -> dict[str, Any]:
    """The way as it comes, and at its best scale by validation rows."""
    start = time.perf_counter()
    updates, scale = way.make(cell)
    seconds, evaluator = time.perf_counter() - start, cell.bench.evaluator
    row = measured(evaluator.score(updates, "test"), scale=scale, seconds=round(seconds, 2))
    if way.tuned:
        factor, best = walk(lambda f: mean(evaluator.score(updates, "validation", f)), Scales(start=1))
        chosen = row if factor == 1 else measured(evaluator.score(updates, "test", factor))
        row["tuned"] = {"factor": factor, "validation": best} | {k: chosen[k] for k in ("mean", "raw", "normalised")}
    return row


def cells(bench: Bench, draws: int, quick: bool) -> Iterator[Cell]:
    """All adapters first, then draws of fewer."""
    names = list(bench.adapters)
    yield from (Cell(bench, seed, quick) for seed in range(draws))
    for count in COUNTS:
        for seed in range(draws if count < len(names) else 0):
            yield Cell(bench.only(chosen_of(names, count, seed)), seed, quick)


def chosen_of(names: Sequence[str], count: int, seed: int) -> list[str]:
    """A draw of ``count`` names, in their order."""
    return sorted(random.Random(1000 * count + seed).sample(names, count), key=names.index)


def with_probes(bench: Bench) -> TaskSet | None:
    """The tasks under heads that were learned on the base; None where a task with a head has none."""

    def probed(task: Task) -> Task:
        return task.model_copy(update={"head": str(Path(task.head).with_name(PROBE))}) if task.head else task

    taskset: TaskSet = bench.taskset.model_copy(
        update={"tasks": {name: probed(task) for name, task in bench.taskset.tasks.items()}}
    )
    heads = [taskset.path(task.head) for task in taskset.tasks.values() if task.head]
    if not heads or not all(head.exists() for head in heads):
        return None
    return taskset


def probes(bench: Bench, taskset: TaskSet) -> Scores:
    """No adapter's honest control: raw scores under those heads, over the own adapters' under their own."""
    found = Evaluator(taskset, {}, bench.rows).score({}, "test").raw
    own, tasks = bench.evaluator.own("test").raw, bench.taskset.tasks
    return Scores(found, shares(found, own, tasks))


def shares(found: Mapping[str, float], own: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Scores over others, the better the larger."""
    return {name: Scored(found[name]).share(own[name], higher_is_better=tasks[name].higher_is_better) for name in own}


def run(bench: Bench, journal: Journal, *, draws: int, only: Sequence[str], quick: bool) -> None:
    """Score what is not there yet."""
    everything = list(bench.adapters)
    own, none, control = (f"all/0/{label}" for label in BOUNDS)
    journal.keep(own, lambda: measured(bench.evaluator.own("test")))
    journal.keep(none, lambda: measured(bench.evaluator.score({}, "test")))
    if (probed := with_probes(bench)) is not None:
        journal.keep(control, lambda: measured(probes(bench, probed)))
    chosen = [way for way in ways() if not only or any(part in way.label for part in only)]
    planned = [
        (f"{'all' if whole else cell.count}/{cell.seed}/{way.label}", cell, way)
        for cell in cells(bench, draws, quick)
        for whole in [cell.count == len(everything)]
        for way in chosen
        if _applies(way, cell, whole=whole)
    ]
    print(f"{sum(key in journal.rows for key, _, _ in planned)} of {len(planned)} rows are there", flush=True)
    for key, cell, way in planned:
        journal.keep(key, partial(score, cell, way))


def _applies(way: Way, cell: Cell, *, whole: bool) -> bool:
    """Whether the way is measured on this cell."""
    if way.classes and not any(task.classes for task in cell.bench.taskset.tasks.values()):
        return False
    if way.answers and not cell.answers:
        return False
    return (way.draws or cell.seed == 0) if whole else way.everywhere


def page(bench: Bench, journal: Journal) -> str:
    """The tables of all adapters, and of fewer."""
    kinds = {name: kind_of(task) for name, task in bench.taskset.tasks.items()}
    present = list(dict.fromkeys(kinds.values()))
    labels = _ordered({named(key)[2] for key in journal.rows})
    lines = []
    for label in labels:
        rows = rows_of(journal.rows, "all", label)
        if rows:
            lines.append([label, *_summary(rows, kinds, present), *_tuned(rows, kinds)])
    header = ["way", "mean", *present, "worst task", "tuned: mean", "worst task", "times auto"]
    parts = [results.table(header, lines)]
    sizes = [*COUNTS, "all"]
    shown = [label for label in labels if rows_of(journal.rows, COUNTS[0], label)]
    same = {size: common_draws(journal.rows, str(size), shown) for size in sizes}
    fewer = [
        [label, *(cell for size in sizes for cell in _pair(rows_of(journal.rows, size, label, same[size])))]
        for label in shown
    ]
    if fewer:
        parts.append(results.table(["way", *(f"{size}{part}" for size in sizes for part in ("", ", tuned"))], fewer))
    return "\n\n".join(parts)


def _ordered(labels: Collection[str]) -> list[str]:
    """As they are measured, whenever each was; of ways that are gone, in alphabetical order."""
    known = [*BOUNDS, *(way.label for way in ways())]
    return [label for label in known if label in labels] + sorted(set(labels) - set(known))


def rows_of(
    rows: Mapping[str, Mapping[str, Any]], count: int | str, label: str, draws: Collection[str] | None = None
) -> list[Mapping[str, Any]]:
    """The draws of a way, of ``count`` adapters; some of them."""
    parts = ((*named(key), row) for key, row in rows.items())
    return [
        row for size, seed, of, row in parts if (size, of) == (str(count), label) and (draws is None or seed in draws)
    ]


def common_draws(keys: Iterable[str], count: str, labels: Collection[str]) -> set[str]:
    """The draws of ``count`` adapters that all these ways have, but for those with none: others are of other tasks."""
    found: dict[str, set[str]] = {}
    for key in keys:
        size, seed, label = named(key)
        if size == count and label in labels:
            found.setdefault(label, set()).add(seed)
    if count == "all":  # ways that no draw changes have one
        return set().union(*found.values())
    return set.intersection(*found.values()) if found else set()


def named(key: str) -> tuple[str, str, str]:
    """How many adapters, which draw, and the way's label."""
    count, seed, label = key.split("/", 2)
    return count, seed, label


def _over(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Mean over these tasks, then draws; its spread over draws where there are several."""
    values = [statistics.fmean(max(0.0, row["normalised"][name]) for name in names) for row in rows]
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def _summary(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str], present: Sequence[str]) -> list[str]:
    groups = [[name for name in kinds if kinds[name] == kind] for kind in present]
    return [_over(rows, list(kinds)), *(_over(rows, names) for names in groups), _worst(rows)]


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    lowest = [min(row["normalised"].items(), key=lambda item: item[1]) for row in rows]
    return f"{statistics.fmean(max(0.0, value) for _, value in lowest):.3f} ({lowest[0][0]})"


def _tuned(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    tuned = [row["tuned"] for row in rows if "tuned" in row]
    if not tuned:
        return ["", "", ""]
    return [_over(tuned, list(kinds)), _worst(tuned), f"{statistics.fmean(row['factor'] for row in tuned):.2g}"]


def _pair(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over draws, as it comes and tuned."""
    plain = [row["mean"] for row in rows]
    tuned = [row["tuned"]["mean"] for row in rows if "tuned" in row]
    return [f"{statistics.fmean(values):.3f}" if values else "" for values in (plain, tuned)]


def published(folder: Path, title: str) -> dict[str, dict[str, Any]]:
    """The rows of a section of results.json."""
    path = folder / "results.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: dict[str, dict[str, Any]] = known.get(title, {}).get("numbers", {})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="folder of the task set")
    parser.add_argument("--only", action="append", default=[], help="ways whose label has this in it; may be repeated")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of tasks and inputs")
    parser.add_argument(
        "--rows",
        type=int,
        nargs=2,
        default=list(ROWS.values()),
        metavar=("VALIDATION", "TEST"),
        help="rows a task that are scored, at most",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run scored")
    parser.add_argument("--page", action="store_true", help="write the tables of what is scored, and score nothing")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps; results go to the work folder")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    rows: dict[Split, int] = {"validation": given.rows[0], "test": given.rows[1]}
    bench = bench_of(parser, given.tasks, QUICK if given.quick else rows)
    name, title = bench.taskset.name + ("-quick" if given.quick else ""), f"Accuracy: {bench.taskset.name}"
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    fresh, scored = given.fresh or given.quick, (bench.rows["validation"], bench.rows["test"])
    journal = Journal.open(
        WORK / f"{name}-{scored[0]}-{scored[1]}.jsonl", published(folder, title), fresh=fresh, scored=scored
    )
    if not given.page:
        run(bench, journal, draws=1 if given.quick else given.draws, only=given.only, quick=given.quick)
    if not journal.rows:
        parser.error(f"nothing is scored on {scored[0]} and {scored[1]} rows yet")
    days = sorted({row["day"] for row in journal.rows.values()})
    body = (
        f"{len(bench.adapters)} adapters; scored from {days[0]} to {days[-1]}; up to {bench.rows['validation']}"
        f" validation and {bench.rows['test']} test rows a task. Normalised by each task's own adapter; no task counts"
        " less than 0. Untuned: default parameters, scale auto. Tuned: the scale alone, by factors of √2 on validation"
        f" rows. Learned weights and fits: {INPUTS} inputs a task, drawn without labels; mean ± standard deviation over"
        " draws. Of fewer adapters, the mean over the draws of tasks that all ways have.\n\n" + page(bench, journal)
    )
    results.write(title, body, journal.rows, seed=0, folder=folder)


if __name__ == "__main__":
    main()
