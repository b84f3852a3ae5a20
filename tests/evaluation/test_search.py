from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from coremerge import Recipe, load, merge
from coremerge.errors import ConfigError, InputError
from coremerge.evaluation import Evaluator, read_taskset
from coremerge.evaluation.plan import make_plan
from coremerge.evaluation.search import margin_of, search, search_files, value_of, winner
from coremerge.learning.backbone import NotFiniteError
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


@pytest.fixture
def joint_folder(own_folder: Path) -> Path:
    """With a second classification task of other labels, joined to the first."""
    file = own_folder / "tasks.yaml"
    data = yaml.safe_load(file.read_text())
    data["tasks"]["mood"] = data["tasks"]["colour"] | {"head": "mood.safetensors", "classes": ["yes", "maybe", "no"]}
    data["joint"] = {"both": ["colour", "mood"]}
    torch.manual_seed(3)
    save_file({"weight": 3 * torch.randn(3, 16)}, own_folder / "mood.safetensors")
    file.write_text(yaml.safe_dump(data))
    return own_folder


def test_a_joint_group_can_be_tuned_for_and_the_winner_is_best_in_it(joint_folder: Path) -> None:
    scales = {"values": [0.0, 0.3, 1.0, 3.0]}
    joint, mean = (
        search_files(joint_folder, make_plan([SUM, TIES], scales=scales, target=t)) for t in ("both", "mean")
    )
    taskset = read_taskset(joint_folder)
    made = Evaluator(taskset, own := {name: load(path) for name, path in taskset.own().items()})
    for row in joint.rows:
        updates = merge(own, row.recipe).adapter
        assert row.validation == made.score(updates, "validation").joint["both"] == max(t.score for t in row.tried)
        assert row.scores.joint["both"] == made.score(updates, "test").joint["both"]
        assert not math.isnan(margin_of(row.scores, "both"))
    assert joint.winner.validation == max(row.validation for row in joint.rows)
    assert (joint.target, joint.to_dict()["target"], mean.target) == ("both", "both", "mean")
    assert [one.score for one in joint.rows[0].tried] != [one.score for one in mean.rows[0].tried]


def test_a_group_that_the_tasks_do_not_have_is_refused_before_any_work(folder: Path, evaluator: Evaluator) -> None:
    plan = make_plan([SUM], target="both")
    with pytest.raises(ConfigError, match=r'target = "both": the task set has no such joint group\. Take one of mean'):
        search_files(folder, plan)
    with pytest.raises(ConfigError, match="no such joint group"):
        search(evaluator, {}, plan)


def test_a_scale_at_which_nothing_is_a_number_is_no_better_than_any(evaluator: Evaluator) -> None:
    found = run(evaluator, SUM, scales={"values": [1e30, 0.7]})
    assert winner(found).tried[0].scale == 0.7 and len(winner(found).tried) == 1
    with pytest.raises(NotFiniteError, match=r"on the inputs of .* the base model's numbers are not finite"):
        run(evaluator, SUM, scales={"values": [1e30]})


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
