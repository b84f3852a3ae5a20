from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge.evaluation import Evaluator, Scores, read_taskset
from coremerge.evaluation.taskset import Task
from coremerge.formats import load
from coremerge.lowrank import LowRank
from tolerances import SINGLE


def adapters_of(folder: Path) -> dict[str, Mapping[str, LowRank]]:
    taskset = read_taskset(folder)
    return {name: load(path) for name, path in taskset.own().items()}


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Evaluator:
    return Evaluator(read_taskset(folder), adapters_of(folder))


def test_each_tasks_own_adapter_scores_one(evaluator: Evaluator) -> None:
    own = evaluator.own("test")
    assert dict(own.normalised) == {"colour": 1.0, "length": 1.0}
    assert math.isnan(own.margin) and own.intervals  # 1 is no measurement; the raw scores are
    for name in own.raw:
        assert not math.isnan(evaluator.score(evaluator.adapters[name], "test", intervals=True).margin)
        assert evaluator.score(evaluator.adapters[name], "test").raw[name] == own.raw[name]


def test_scores_are_those_of_the_merged_weights(evaluator: Evaluator, folder: Path) -> None:
    updates = evaluator.adapters["colour"]
    rows = evaluator.taskset.rows("length", "test")
    head = load_file(folder / "length" / "head.safetensors")
    with evaluator.encoder.carrying(updates, 0.3):
        features = evaluator.encoder.features(evaluator.encoder.batches(rows))
    outputs = features @ head["weight"][0] + head["bias"][0]
    expected = torch.corrcoef(torch.stack([outputs, torch.tensor([row.label for row in rows])]))[0, 1].item()
    assert evaluator.score(updates, "test", 0.3).raw["length"] == pytest.approx(expected, abs=SINGLE)


def test_the_top_classes_are_those_of_the_largest_outputs(evaluator: Evaluator, own_folder: Path) -> None:
    torch.manual_seed(1)
    save_file({"weight": torch.randn(5, 16)}, own_folder / "five.safetensors")
    shared = {"kind": "classification", "classes": ["no", "yes", "a", "b", "c"], "head": "five.safetensors"}
    metrics = ("accuracy", "top_1", "top_2", "top_4")
    tasks = {name: Task(metric=name, test="colour.test.jsonl", **shared) for name in metrics}  # type: ignore[arg-type]
    taskset = read_taskset(own_folder).model_copy(update={"tasks": tasks})
    made = Evaluator(taskset, {})
    scores = made.score({}, "test", intervals=True)
    rows = taskset.rows("top_2", "test")
    outputs = made.encoder.features(made.encoder.batches(rows)) @ load_file(own_folder / "five.safetensors")["weight"].T
    places = [(row > row[int(label)]).sum().item() for row, (_, label) in zip(outputs, rows, strict=True)]  # type: ignore[arg-type]
    assert {name: scores.raw[name] for name in metrics[1:]} == {
        f"top_{k}": sum(place < k for place in places) / len(places) for k in (1, 2, 4)
    }
    assert scores.raw["top_1"] == scores.raw["accuracy"] and scores.intervals["top_1"] == scores.intervals["accuracy"]


def test_no_update_is_the_base_and_scoring_leaves_it_as_it_was(evaluator: Evaluator) -> None:
    before = evaluator.score({}, "test")
    evaluator.score(evaluator.adapters["colour"], "test", 5.0)
    assert evaluator.score({}, "test") == before
    assert evaluator.score(evaluator.adapters["colour"], "test", 0.0) == before


def test_own_scores_do_not_depend_on_what_was_scored_first(evaluator: Evaluator, folder: Path) -> None:
    fresh = Evaluator(read_taskset(folder), adapters_of(folder))
    updates = evaluator.adapters["colour"]
    assert evaluator.own("test") == Evaluator(read_taskset(folder), adapters_of(folder)).own("test")
    assert fresh.score(updates, "test") == evaluator.score(updates, "test")


def test_limits_take_the_first_rows(folder: Path) -> None:
    limited = Evaluator(read_taskset(folder), adapters_of(folder), {"test": 4})
    assert limited.own("test").raw["colour"] in {0.0, 0.25, 0.5, 0.75, 1.0}
    assert limited.count("colour", "test") == 4
    assert limited.count("colour", "validation") == 12


def test_mean_and_worst() -> None:
    scores = Scores({"a": 0.5, "b": 0.3}, {"a": 1.0, "b": 0.5})
    assert (scores.mean, scores.mean_raw, scores.worst) == (0.75, 0.4, "b")
    assert scores.to_dict()["normalised"] == {"a": 1.0, "b": 0.5}
