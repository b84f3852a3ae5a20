"""The method that CONTRIBUTING.md shows is one: it passes what it says every method has to pass."""

from __future__ import annotations

import re
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import oracles
import test_against_oracles
import test_conformance
from coremerge.adapter import Adapter
from coremerge.catalog import find
from coremerge.merging import merge
from coremerge.methods import METHODS
from coremerge.recipe import Recipe
from coremerge.spaces import SPACES
from laws import SPACE_SPECS, close, lowrank

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD, ORACLE = (textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    """Registered as its file would do it, with its oracle."""
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    known = set(METHODS)
    names: dict[str, Any] = {"__name__": "coremerge.methods.shown"}
    exec(compile(METHOD, "CONTRIBUTING.md", "exec"), names)
    (name,) = set(METHODS) - known
    shown = dict(vars(oracles))
    exec(compile(ORACLE, "CONTRIBUTING.md", "exec"), shown)
    monkeypatch.setattr(oracles, name, shown[name], raising=False)
    return name


def test_it_is_its_oracle(method: str) -> None:
    for space, step in product(SPACES, test_against_oracles.STEP_SPECS):
        test_against_oracles.check(space, method, step)


def test_it_obeys_the_laws(method: str) -> None:
    for space, steps in product(SPACE_SPECS, test_conformance.STEP_SPECS):
        test_conformance.test_every_combination({"space": space, "method": method, "parameters": {}, "steps": steps})
    for steps in test_conformance.UNITARY_STEPS:
        test_conformance.test_unitary_methods_do_not_see_space_gauge_or_rotation(method, steps)
    for settings in ({"basis": "balanced"}, {"steps": ("balance",)}):
        test_conformance.test_balanced_factors_leave_no_gauge(method, settings)
    for space in SPACE_SPECS:
        test_conformance.test_linear_methods_are_the_identity_on_one_adapter(space, method)
    test_conformance.test_declarations_are_consistent()


def test_its_parameters_are_those_of_the_command(method: str) -> None:
    (parameter,) = find(method).parameters
    assert (parameter.name, parameter.type, parameter.default) == ("share", "number > 0, ≤ 1", 0.5)
    update = lowrank(6, 5, 2)
    adapter = Adapter.from_updates({"layer": update})
    merged = merge([adapter, adapter], Recipe(method=method, parameters={"share": "0.3"}, scale=1.0)).adapter
    close(merged["layer"].dense(), 0.6 * update.dense())
