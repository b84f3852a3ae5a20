"""coremerge methods."""

from __future__ import annotations

import json

import pytest

from coremerge.catalog import GROUPS, catalog
from coremerge.methods import METHODS
from coremerge.recipe import Recipe
from coremerge.spaces import SPACES
from coremerge.steps import STEPS


def test_lists_everything_with_its_parameters_and_paper(run):
    shown = run("methods").stdout
    for registry in (METHODS, SPACES, STEPS):
        for name, entry in registry.entries.items():
            assert f"\n  {name} " in shown
            assert entry.source in " ".join(shown.split())
    assert "density=0.2, reduce=mean" in shown
    assert "parameters: rank\n" in shown  # of truncate: required


def test_methods_are_listed_by_what_they_are_for(run):
    """Each once, under its own group, the default's first; a group says when to choose from it."""
    shown = run("methods").stdout
    places = [shown.index(f"\n{group}: ") for group in GROUPS]
    assert places == sorted(places)
    for name in METHODS:
        at = shown.index(f"\n  {name} ")
        (group,) = [part.group for part in catalog() if (part.kind, part.name) == ("method", name)]
        before = [place for place in places if place < at]
        assert len(before) == [*GROUPS].index(group) + 1
    assert f"\n  {Recipe().method} " in shown[places[0] : places[1]]
    assert "\ngroup   sums\n" in run("methods", "mean").stdout
    assert "group" not in run("methods", "truncate").stdout


def test_a_method_says_its_group_and_one_that_does_not_has_that_of_its_traits(run, monkeypatch):
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    for name, traits in {
        "likesum": {"unitary": True, "linear": True},
        "likeiso": {"unitary": True},
        "liketies": {"elementwise": True},
        "said": {"elementwise": True, "group": "sums"},
        "other": {"unitary": True, "group": "of one's own"},
    }.items():
        METHODS.register(name, source="none", **traits)(METHODS["sum"].factory)
    found = {part.name: part.group for part in catalog() if part.kind == "method"}
    assert [found[name] for name in ("likesum", "likeiso", "liketies", "said")] == [
        "sums",
        "directions",
        "entries",
        "sums",
    ]
    assert list(found)[-1] == "other"
    assert "\nof one's own\n\n  other " in run("methods").stdout


def test_one_in_full(run):
    shown = run("methods", "ties").stdout
    assert shown.startswith("method ties\n")
    assert "  density  (number > 0, ≤ 1 or one for each adapter; default 0.2)\n      the share of entries" in shown
    assert "  reduce  (mean or sum; default mean)" in shown
    assert "element-wise" in shown
    assert "arXiv 2306.01708" in shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("truncate", "rank  (integer ≥ 1; required)"),
        ("isotropize", "span  (true or false; default true)"),
        ("tsv", "rank  (integer ≥ 1 or none; default none)"),
        ("sum", "linear: a weighted sum"),
        ("knots", "--space knots[:KEY=VALUE]"),
        ("core", "rtol  (number > 0, < 1; default 1e-08)"),
    ],
)
def test_types_and_defaults_in_plain_words(run, name, text):
    assert text in run("methods", name).stdout


def test_json(run):
    found = json.loads(run("methods", "--json").stdout)
    assert {part["name"] for part in found["methods"]} == set(METHODS)
    assert {part["name"] for part in found["spaces"]} == set(SPACES)
    assert {part["name"] for part in found["steps"]} == set(STEPS)
    assert {part["group"] for part in found["methods"]} == set(found["groups"])
    assert {part["group"] for part in found["spaces"] + found["steps"]} == {None}
    (ties,) = (part for part in found["methods"] if part["name"] == "ties")
    assert ties["parameters"][0] == {
        "name": "density",
        "type": "number > 0, ≤ 1 or one for each adapter",
        "default": 0.2,
        "required": False,
        "help": "the share of entries of each core that is kept, in (0, 1]; or a list, one for each adapter.",
    }
    assert json.loads(run("methods", "ties", "--json").stdout) == ties


def test_an_unknown_name_is_refused(run):
    result = run("methods", "tie")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no method, space or step 'tie'")
