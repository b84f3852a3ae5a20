"""A manifest of many merges."""

from __future__ import annotations

import json

import pytest
import yaml

from coremerge import Recipe
from coremerge.errors import ConfigError
from coremerge.manifest import DEFAULT, read_manifest

PAIR = {"pair": ["A", "B"]}


def read(folder, data):
    path = folder / "m.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return read_manifest(path)


def refused(folder, data, *parts):
    with pytest.raises(ConfigError) as error:
        read(folder, data)
    for part in (str(folder / "m.yaml"), *parts):
        assert part in str(error.value)


def places(manifest):
    return ["/".join(choice.parts) for choice in manifest.choices()]


def test_every_set_goes_with_every_recipe(tmp_path):
    manifest = read(tmp_path, {"sets": {**PAIR, "one": ["A"]}, "recipes": {"x": {}, "y": {"rank": 3}}})
    assert places(manifest) == ["pair/x", "pair/y", "one/x", "one/y"]
    assert manifest.recipe("y").recipe == Recipe(rank=3)


def test_without_recipes_there_is_the_default(tmp_path):
    manifest = read(tmp_path, {"sets": PAIR})
    assert places(manifest) == [f"pair/{DEFAULT}"]
    assert manifest.recipe(DEFAULT).recipe == Recipe()


def test_jobs_take_the_place_of_the_product(tmp_path):
    jobs = [{"set": "pair"}, {"set": "pair", "recipe": "x", "name": "best"}]
    manifest = read(tmp_path, {"sets": PAIR, "recipes": {"default": None, "x": {}}, "jobs": jobs})
    assert places(manifest) == ["pair/default", "best"]


def test_a_recipe_may_be_a_file_beside_it(tmp_path):
    (tmp_path / "r.yaml").write_text("merge_method: ties\nbase_model: org/base")
    manifest = read(tmp_path, {"sets": PAIR, "recipes": {"x": "r.yaml"}})
    assert manifest.recipe("x").recipe == Recipe(method="ties")
    assert manifest.recipe("x").base_model == "org/base"


def test_json_is_read_too(tmp_path):
    assert read(tmp_path, json.dumps({"sets": PAIR})) == read(tmp_path, {"sets": PAIR})


@pytest.mark.parametrize(
    "name",
    ["..", ".", ".x", "a/b", "/a", "../a", "a\\b", "C:", "a\n", "\x1b[31m", "a\u202eb", "", " ", "a ", "a.", "x" * 201],
)
@pytest.mark.parametrize("kind", ["sets", "recipes", "jobs"])
def test_names_that_are_no_folders_are_refused(tmp_path, kind, name):
    data = {
        "sets": {"sets": {name: ["A"]}},
        "recipes": {"sets": PAIR, "recipes": {name: {}}},
        "jobs": {"sets": PAIR, "jobs": [{"set": "pair", "name": name}]},
    }
    refused(tmp_path, data[kind], f"{kind}.0.name" if kind == "jobs" else f"{kind} = ", "a name becomes a folder")


@pytest.mark.parametrize("name", ["no", "on", "true", "16", "0x10", "1.50", "2001-01-01"])
def test_names_that_read_like_something_else_are_names(tmp_path, name):
    text = f"sets: {{{name}: {{models: [{name}, a], initial: {{{name}: {name}}}}}}}\nrecipes: {{{name}: {{}}}}\n"
    found = read(tmp_path, text + f"jobs: [{{set: {name}, recipe: {name}, name: {name}}}]")
    assert found.sets[name].models == (name, "a") and found.sets[name].initial == {name: name}
    assert list(found.recipes) == [name] and found.jobs[0].parts == (name,)


@pytest.mark.parametrize("other", ["PAIR", "pAir"])
def test_names_must_differ_where_case_does_not_count(tmp_path, other):
    refused(tmp_path, {"sets": {**PAIR, other: ["A"]}}, "sets = ", f"pair and {other} are one name")
    refused(tmp_path, {"sets": PAIR, "recipes": {"é": {}, "e\u0301": {}}}, "recipes = ", "are one name")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("[]", ["a manifest is a mapping"]),
        ("{}", ["sets", "Field required", "Add the key"]),
        ({"sets": {}}, ["sets = {}"]),
        ({"sets": PAIR, "recipe": {}}, ["recipe = {}", "Extra inputs"]),
        ({"sets": {"pair": "A"}}, ['sets.pair = "A"', "a set is a list of adapters"]),
        ({"sets": {"pair": []}}, ["sets.pair.models"]),
        ({"sets": {"pair": [[]]}}, ["sets.pair.models.0 = []"]),
        ({"sets": {"pair": {"models": ["A"], "vera_width": True}}}, ["sets.pair.vera_width = true", "no numbers"]),
        ({"sets": {"pair": {"models": ["A"], "rank": 3}}}, ["sets.pair.rank = 3"]),
        ({"sets": {"pair": {"models": ["A"], "vera_width": 0}}}, ["sets.pair.vera_width = 0"]),
        ({"sets": {"pair": {"models": ["A"], "vera_width": 2, "base": "B"}}}, ["sets.pair", "in place of base"]),
        ("sets: {a: [A], a: [B]}", ["'a' is there twice"]),
        ('sets: {"\\ud800": [A]}', ["sets"]),
        ('sets: {a: ["\\ud800"]}', ["sets.a.models.0"]),
        ({"sets": PAIR, "recipes": {"x": {"rank": 0}}}, ["recipes.x", "rank = 0"]),
        ({"sets": PAIR, "recipes": {"x": {"methode": "ties"}}}, ["recipes.x", "methode", "unknown key"]),
        ({"sets": PAIR, "recipes": {"x": 3}}, ["recipes.x", "3: a recipe is a mapping"]),
        ({"sets": PAIR, "recipes": {"x": "none.yaml"}}, ["recipes.x", "none.yaml: cannot be read"]),
        ({"sets": PAIR, "recipes": {"x": {"models": ["A"]}}}, ["recipes.x", 'models = ["A"]', "listed under sets"]),
        ({"sets": PAIR, "jobs": []}, ["jobs = []"]),
        ({"sets": PAIR, "jobs": [{"recipe": "default"}]}, ["jobs.0.set", "Add the key"]),
        ({"sets": PAIR, "jobs": [{"set": "no"}]}, ["there is no set 'no'; known: pair"]),
        ({"sets": PAIR, "jobs": [{"set": "pair", "recipe": "no"}]}, ["there is no recipe 'no'; known: default"]),
        ({"sets": PAIR, "jobs": [{"set": "pair"}, {"set": "pair"}]}, ["two would be written to pair/default"]),
        (
            {"sets": PAIR, "jobs": [{"set": "pair"}, {"set": "pair", "name": "Pair"}]},
            ["pair/default would be written into another result"],
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_and_key(tmp_path, data, parts):
    refused(tmp_path, data, *parts)
