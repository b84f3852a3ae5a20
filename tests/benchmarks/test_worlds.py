"""What the harness of all worlds computes, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from benchmarks.accuracy import worlds
from benchmarks.accuracy.work import Bench, kind_of
from benchmarks.accuracy.worlds import Cell, Journal, Way

from coremerge import Adapter, LowRank, Recipe
from coremerge.evaluation import Scores
from coremerge.evaluation.taskset import Task


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(5, 2, generator=generator).double(), torch.randn(2, 4, generator=generator).double()
    return Adapter.from_updates({"a": LowRank(*factors)}, name=str(seed))


class Stub:
    """Scores best at four fifths of the merge's own strength."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []

    def score(self, updates: Any, split: str, scale: float = 1.0, **_: Any) -> Scores:
        self.asked.append((split, scale))
        value = 1 - abs(scale - 0.8)
        return Scores({"t0": value, "t1": -1.0}, {"t0": value, "t1": -1.0})


@pytest.fixture
def cell() -> Cell:
    bench = Bench(cast(Any, None), {f"t{seed}": adapter(seed) for seed in range(2)}, {"validation": 1, "test": 1})
    vars(bench)["evaluator"] = Stub()
    return Cell(bench, 0)


def test_no_task_counts_less_than_nothing() -> None:
    assert worlds.mean(Scores({}, {"a": 0.5, "b": -9.0})) == 0.25


def test_a_way_is_tuned_on_validation_rows_and_scored_twice_on_test_rows(cell: Cell) -> None:
    row = worlds.score(cell, Way("sum", worlds.of_recipe(Recipe(method="sum", scale=0.5)), tuned=True))
    asked = cast(Stub, cell.bench.evaluator).asked
    assert row["scale"] == 0.5 and row["mean"] == pytest.approx(0.4)
    assert row["tuned"]["factor"] == pytest.approx(2**-0.5)
    assert [split for split, _ in asked].count("test") == 2
    assert row["tuned"]["mean"] == pytest.approx((1 - abs(2**-0.5 - 0.8)) / 2)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    journal = Journal.open(path)
    journal.keep("all/0/sum", lambda: {"mean": 0.5})
    again = Journal.open(path)
    again.keep("all/0/sum", lambda: pytest.fail("made again"))
    assert again.rows["all/0/sum"]["mean"] == 0.5
    assert json.loads(path.read_text())["key"] == "all/0/sum"
    published = {"all/0/x": {"mean": 1.0, "rows": [100, 300]}}
    assert Journal.open(path, published, fresh=True).rows == {}
    assert list(Journal.open(path, published).rows) == ["all/0/x"]
    assert Journal.open(tmp_path / "y.jsonl", published, scored=(6, 6)).rows == {}  # other rows, other numbers


def test_dense_tasks_are_a_kind_of_their_own() -> None:
    given = {"metric": "r2", "head": "h", "test": "t"}
    tasks = [Task(kind="regression", **given), Task(kind="regression", per="patch", **given)]
    assert [kind_of(task) for task in tasks] == ["regression", "dense"]


def test_the_page_has_kinds_apart_and_fewer_adapters(tmp_path: Path) -> None:
    tasks = {
        "t0": Task(kind="classification", classes=("x", "y"), metric="accuracy", head="h", test="t"),
        "t1": Task(kind="regression", metric="r2", head="h", test="t"),
    }
    bench = cast(Bench, SimpleNamespace(taskset=SimpleNamespace(tasks=tasks)))
    journal = Journal.open(tmp_path / "x.jsonl", fresh=True)
    row = {"mean": 0.25, "normalised": {"t0": 0.5, "t1": -3.0}, "raw": {}}
    tuned = {"factor": 0.5, "mean": 0.5, "normalised": {"t0": 0.5, "t1": 0.5}}
    for key in ("all/0/sum", "2/0/sum"):
        journal.keep(key, lambda: {**row, "tuned": tuned})
    text = worlds.page(bench, journal)
    assert "| way | mean  | classification | regression | worst task" in text
    assert "| sum | 0.250 | 0.500          | 0.000      | 0.000 (t1)" in text
    assert "2, tuned" in text


def test_errors_under_other_heads_are_turned_round() -> None:
    given = {"head": "h", "test": "t"}
    tasks = {
        "t0": Task(kind="regression", metric="r2", **given),
        "t1": Task(kind="regression", metric="mae", **given),
    }
    assert worlds.shares({"t0": 0.4, "t1": 4.0}, {"t0": 0.8, "t1": 1.0}, tasks) == {"t0": 0.5, "t1": 0.25}


def test_labels_of_ways_differ() -> None:
    labels = [way.label for way in worlds.ways()]
    assert len(labels) == len(set(labels))


def test_random_masks_are_drawn_anew_for_each_draw(cell: Cell) -> None:
    make = worlds.of_recipe(Recipe(method="dare_ties"))
    first, again, other = (make(Cell(cell.bench, seed))[0]["a"].dense() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_weights_that_stand_before_several_methods_are_learned_once(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(Cell, "_learned", lambda self, **settings: calls.append(settings) or {"t0": 0.5})
    for objective in ("nsc", "nsc", "match"):
        assert cell.learned(objective=objective) == {"t0": 0.5}
    assert [one["objective"] for one in calls] == ["nsc", "match"]


def test_rows_stand_as_they_are_measured_and_old_ones_last() -> None:
    assert worlds._ordered({"zz", "fit", "no adapter", "core ties"}) == ["no adapter", "core ties", "fit", "zz"]
