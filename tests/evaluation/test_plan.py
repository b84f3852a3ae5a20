from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from coremerge import Recipe
from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation.plan import PLAN, Plan, combinations, read_plan, recipe_of


def plan_of(tmp_path: Path, **values: Any) -> Plan:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(values))
    return read_plan(file)


def test_a_list_of_spaces_or_steps_is_as_many_merges(tmp_path: Path) -> None:
    entry = {"merge_method": "ties", "space": ["full", "core"], "steps": [[], ["isotropize"]]}
    plan = plan_of(tmp_path, merges=[entry, {"merge_method": "task_arithmetic", "label": "TA"}])
    labels = ["full ties", "full ties + isotropize", "core ties", "core ties + isotropize", "core TA"]
    assert [merge.label for merge in plan.merges] == labels
    recipes = [recipe_of(merge, {}) for merge in plan.merges]
    assert recipes[1] == Recipe(space="full", method="ties", steps=["isotropize"], rank="exact")
    assert recipes[4].method == "sum"


def test_a_list_of_values_is_tuned_within_a_merge(tmp_path: Path) -> None:
    entry = {"merge_method": "ties", "parameters": {"density": [0.1, 0.2]}, "rank": [8, "exact"]}
    (merge,) = plan_of(tmp_path, merges=[entry]).merges
    tried = list(combinations(merge.tried))
    assert tried == [{"density": d, "recipe.rank": r} for d in (0.1, 0.2) for r in (8, "exact")]
    expected = Recipe(method="ties", parameters={"density": 0.2}, rank=8, scale=2.0)
    assert recipe_of(merge, {"density": 0.2, "recipe.rank": 8}, scale=2.0) == expected


def test_parameters_that_are_no_lists_are_fixed(tmp_path: Path) -> None:
    entry = {"merge_method": "cart", "parameters": {"rank": [2, 3], "scale": 0.8}}
    (merge,) = plan_of(tmp_path, merges=[entry]).merges
    assert recipe_of(merge, {}).parameters == {"scale": 0.8}
    assert merge.tried == {"rank": (2, 3)}


def test_an_entry_without_a_method_is_the_default_merge(tmp_path: Path) -> None:
    (merge,) = plan_of(tmp_path, merges=[{"label": "default"}]).merges
    assert recipe_of(merge, {}) == Recipe(rank="exact")
    assert merge.label == "core default"


def test_a_methods_parameter_may_be_called_like_a_recipes_key(tmp_path: Path) -> None:
    (merge,) = plan_of(tmp_path, merges=[{"merge_method": "tsv", "parameters": {"rank": [2]}, "rank": 8}]).merges
    recipe = recipe_of(merge, {"rank": 2})
    assert (recipe.parameters, recipe.rank) == ({"rank": 2}, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "list of merges"),
        ({"merges": [3]}, "a merge is a mapping"),
        ({"merges": []}, "merges"),
        ({"merges": [{"merge_method": "nope"}]}, "nope"),
        ({"merges": [{"merge_method": "ties", "parameters": {"density": [0.1, 7]}}]}, "density"),
        ({"merges": [{"merge_method": "ties", "colour": 1}]}, "colour"),
        ({"merges": [{"merge_method": "sum"}], "budget": 0}, "budget"),
        ({"merges": [{"merge_method": "sum"}], "scales": {"step": 1, "factor": 2}}, "either factor or step"),
        ({"merges": [{"merge_method": "sum"}], "target": ["all"]}, "target"),
        ({"merges": [{"merge_method": "sum"}], "speed": 1}, "speed"),
    ],
)
def test_what_means_nothing_is_refused_and_the_file_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan_of(tmp_path, **values)
    assert "plan.yaml" in str(error.value)


def test_what_is_no_yaml_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("{a: [}")
    with pytest.raises(ConfigError, match="not YAML"):
        read_plan(tmp_path / "plan.yaml")
    with pytest.raises(SourceError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")


def test_the_default_plan_has_every_merge_once() -> None:
    labels = [merge.label for merge in PLAN.merges]
    assert len(labels) == len(set(labels)) == 11
    assert {"core cart", "core dare_ties", "full ties", "knots ties"} <= set(labels)
