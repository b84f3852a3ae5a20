"""What a merge costs, from shapes alone."""

from __future__ import annotations

import pytest

from coremerge import Recipe
from coremerge.cost import Cost, cost_of, cost_of_module
from coremerge.formats import load
from coremerge.pipeline import prepare
from coremerge.plan import make_plan
from tiny import NARROW, WIDTH, make_adapter, make_base


def plan_of(folder, recipe=None, count=3, r=4, layers=2):
    sources = [make_adapter(folder / f"{i}-{r}-{layers}", r, seed=i, layers=layers) for i in range(count)]
    return make_plan([load(source) for source in sources], recipe or Recipe())


def test_bytes_are_those_of_the_files(tmp_path):
    plan = plan_of(tmp_path)
    sides = 2 * (2 * WIDTH + NARROW + WIDTH)
    cost = cost_of(plan)
    assert (cost.modules, cost.read, cost.written) == (4, 3 * 3 * 4 * sides * 4, 12 * sides * 4)
    assert cost.to_dict()["bytes_read"] == cost.read


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(rank=2), Recipe(method="ties", space="full")])
def test_it_adds_up_over_modules(tmp_path, recipe):
    plan = plan_of(tmp_path, recipe)
    parts = [cost_of_module(plan, name) for name in plan.modules]
    assert sum(parts, Cost()) == cost_of(plan)
    assert cost_of(plan).processor_seconds == pytest.approx(sum(part.processor_seconds for part in parts))


def test_it_grows_as_the_work_does(tmp_path):
    one, layers, rank = (
        plan_of(tmp_path, Recipe(method="tsv"), **changes) for changes in ({}, {"layers": 4}, {"r": 8})
    )
    assert cost_of(layers).operations == 2 * cost_of(one).operations
    assert cost_of(rank).tall > 3 * cost_of(one).tall
    assert cost_of(plan_of(tmp_path, Recipe(rank=2))).operations < cost_of(one).operations
    assert cost_of(plan_of(tmp_path, Recipe(method="ties", space="full"))).dense > 0 == cost_of(one).dense


def test_more_workers_help_until_one_process_is_busy_with_them(tmp_path):
    cost = cost_of(plan_of(tmp_path))
    assert cost.seconds(1) > cost.seconds(2) > cost.seconds(1000)
    assert cost.seconds(10**9, cluster=True) > cost.seconds(10**9)


def test_into_a_model_the_model_is_copied(tmp_path):
    source = make_adapter(tmp_path / "A")
    prepared = prepare([source], Recipe(), into=make_base(tmp_path / "base"))
    assert prepared.cost.copied == prepared.output_bytes
    assert prepared.cost.to_dict()["bytes_written"] == prepared.output_bytes
    assert prepared.to_dict()["cost"]["operations"] == prepared.cost.operations
