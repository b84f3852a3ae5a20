from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coremerge import Recipe, load, merge
from coremerge.errors import InputError
from coremerge.evaluation import Evaluator, read_taskset
from coremerge.evaluation.plan import make_plan
from coremerge.evaluation.search import search, search_files, value_of, winner
from coremerge.recipe import read_recipe
from posted import Posted

TIES = {"merge_method": "ties", "parameters": {"density": [0.5, 1.0]}}
SUM = {"merge_method": "sum"}


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Evaluator:
    taskset = read_taskset(folder)
    return Evaluator(taskset, {name: load(path) for name, path in taskset.own().items()})


def run(evaluator: Evaluator, *merges: Any, **plan: Any) -> Any:
    return search(evaluator, dict(evaluator.adapters), make_plan(merges, **plan))  # type: ignore[arg-type]


def test_the_best_of_all_that_was_tried_is_chosen_and_scored_as_its_recipe_says(evaluator: Evaluator) -> None:
    (found,) = run(evaluator, TIES)
    best = max(found.tried, key=lambda one: one.score)
    assert found.validation == best.score
    assert found.recipe == Recipe(method="ties", parameters=dict(best.parameters), scale=best.scale, rank="exact")
    updates = merge(dict(evaluator.adapters), found.recipe).adapter  # type: ignore[arg-type]
    assert found.validation == pytest.approx(value_of(evaluator.score(updates, "validation")))
    assert dict(found.scores.raw) == pytest.approx(dict(evaluator.score(updates, "test").raw))
    assert found.scores.intervals
    assert {one.parameters["density"] for one in found.tried} == {0.5, 1.0}


def test_by_coordinate_the_scale_comes_first(evaluator: Evaluator) -> None:
    (found,) = run(evaluator, TIES, order="coordinate", scales={"values": [0.5, 1.0, 2.0]})
    assert [one.parameters["density"] for one in found.tried] == [0.5, 0.5, 0.5, 1.0]
    best = max(found.tried[:3], key=lambda one: one.score)
    assert found.tried[3].scale == best.scale


def test_the_budget_ends_a_search_and_says_so(evaluator: Evaluator) -> None:
    whole, cut = (run(evaluator, TIES, SUM, budget=budget) for budget in (100, 2))
    assert [len(one.tried) for one in cut] == [2, 2]
    assert all(one.stopped for one in cut)
    assert not any(one.stopped for one in whole)
    assert cut[0].tried == whole[0].tried[:2]


def test_the_winner_is_best_on_validation_rows(evaluator: Evaluator) -> None:
    found = run(evaluator, TIES, SUM, scales={"values": [0.7]})
    assert winner(found).validation == max(one.validation for one in found)


def test_the_winners_recipe_does_it_again(folder: Path, tmp_path: Path) -> None:
    found = search_files(folder, make_plan([SUM, TIES], scales={"values": [0.5]}), limits={"validation": 6})
    (tmp_path / "recipe.yaml").write_text(found.recipe())
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read.recipe == found.winner.recipe
    assert read.models == (str(folder / "colour"), str(folder / "length"))
    json.dumps(found.to_dict(), allow_nan=False)


def test_other_processes_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([SUM, TIES], scales={"values": [0.5, 1.0]})
    told: list[tuple[str, int, int]] = []
    here = search_files(folder, plan)
    monkeypatch.chdir(folder)
    there = search_files(".", plan, ["colour", "length"], executor=Posted(), progress=lambda *stage: told.append(stage))
    assert told == [("tuned", 1, 2), ("tuned", 2, 2)] and there.models == ("colour", "length")
    for one, other in zip(here.rows, there.rows, strict=True):
        assert (one.recipe, one.tried, one.scores) == (other.recipe, other.tried, other.scores)


def test_given_adapters_are_merged_instead_of_the_tasks_own(folder: Path) -> None:
    plan = make_plan([SUM], scales={"values": [1.0]})
    found = search_files(folder, plan, [folder / "colour"])
    assert found.rows[0].scores.normalised["colour"] == pytest.approx(1.0)
    assert found.models == (str(folder / "colour"),)


def test_without_own_adapters_raw_scores_are_tuned_for_and_some_must_be_named(own_folder: Path) -> None:
    file = own_folder / "tasks.yaml"
    data = yaml.safe_load(file.read_text())
    for task in data["tasks"].values():
        del task["adapter"]
    file.write_text(yaml.safe_dump(data))
    plan = make_plan([SUM], scales={"values": [1.0]})
    (row,) = search_files(own_folder, plan, [own_folder / "colour"]).rows
    assert row.validation == sum(row.validation for _ in (0,))
    with pytest.raises(InputError, match="nothing to merge"):
        search_files(own_folder, plan)
