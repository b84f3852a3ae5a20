"""Laws that hold for every method × space × step. Registering one is all it takes to join."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult, merge
from coremerge.methods import METHODS
from coremerge.recipe import Recipe
from coremerge.registry import Spec
from coremerge.spaces import SPACES
from coremerge.steps import STEPS
from laws import (
    BASIC,
    BASIC_STEPS,
    SPACE_SPECS,
    close,
    dense,
    examples,
    label,
    make,
    normal,
    orthogonal,
    regauged,
    variants,
)

SHAPES = {"long": (11, 6), "square": (8, 8), "wide": (5, 12)}
KINDS = {
    "a": {"long": ("plain", 2), "square": ("plain", 3), "wide": ("plain", 2)},
    "b": {"long": ("plain", 3), "square": ("deficient", 2), "wide": ("same right", 2)},
    "c": {"long": ("tiny", 1), "wide": ("duplicate", 2)},
    "d": {"long": ("zero", 2), "square": ("skewed", 2)},
}


STEP_SPECS: list[tuple[Spec, ...]] = [(), *((spec,) for name in STEPS for spec in variants(STEPS[name]))]
UNITARY_STEPS: list[tuple[Spec, ...]] = [(), *(({n: examples(STEPS[n])},) for n in STEPS if STEPS[n].unitary)]
PLAIN_SPACES = [{name: examples(SPACES[name])} for name in SPACES]


def adapters() -> dict[str, Adapter]:
    """Four adapters over three modules: mixed ranks, missing modules, zero, deficient, shared and duplicate updates."""
    draw = normal(7)
    made: dict[str, list[LowRank]] = {name: [] for name in SHAPES}
    result = {}
    for key, kinds in KINDS.items():
        for name, (kind, r) in kinds.items():
            made[name].append(make(kind, *SHAPES[name], r, draw, made[name]))
        result[key] = Adapter.from_updates({name: made[name][-1] for name in kinds}, name=key)
    return result


def mapped(change) -> dict[str, Adapter]:
    return {
        key: Adapter.from_updates({name: change(name, u) for name, u in adapter.items()}, name=key)
        for key, adapter in adapters().items()
    }


def run(given: dict[str, Adapter], recipe: dict, **how: object) -> MergeResult:
    return merge(given, Recipe(**{"scale": 1.0, **recipe}), **{"threads": 1, **how})


def same(a: MergeResult, b: MergeResult, factor: float = 1.0, tol: float = 1e-8) -> None:
    left, right = dense(a.adapter), dense(b.adapter)
    assert left.keys() == right.keys()
    for name in left:
        close(left[name], factor * right[name], tol=tol)


def is_basic(method: str, steps: tuple) -> bool:
    return method in BASIC and all(name in BASIC_STEPS for step in steps for name in step)


COMBINATIONS = [
    (space, method, steps)
    for space, method, steps in product(SPACE_SPECS, METHODS, STEP_SPECS)
    if is_basic(method, steps)
    or not steps  # else each method with each step in one space, and each step in every space after two methods
    or space == SPACE_SPECS[0]
    or method in {"tsv", "ties"}
]


@pytest.fixture(params=COMBINATIONS, ids=lambda p: "/".join(map(label, p)))
def recipe(request: pytest.FixtureRequest) -> dict:
    space, method, steps = request.param
    return {"space": space, "method": method, "parameters": examples(METHODS[method]), "steps": steps}


def test_every_combination(recipe: dict) -> None:
    given = adapters()
    before = {key: {n: (u.left.clone(), u.right.clone()) for n, u in a.items()} for key, a in given.items()}
    result = run(given, recipe)
    updates = dense(result.adapter)

    # Shapes, ranks and the report say what is there.
    for name, update in result.adapter.items():
        report, planned = result.report.modules[name], result.plan.modules[name].module
        assert update.shape == SHAPES[name] == report.shape
        assert update.left.isfinite().all()
        assert update.right.isfinite().all()
        assert update.rank == report.rank == report.merged_rank <= planned.rank
        assert update.norm().square().item() == pytest.approx(report.energy, rel=1e-9)
        assert report.norm == pytest.approx(torch.linalg.matrix_norm(updates[name], 2).item(), rel=1e-8)
        assert report.lost == 0

    # Nothing is changed, and nothing but the inputs counts.
    for key, adapter in given.items():
        for name, update in adapter.items():
            assert torch.equal(update.left, before[key][name][0])
            assert torch.equal(update.right, before[key][name][1])
    for name, update in run(given, recipe, threads=3).adapter.items():
        assert torch.equal(update.left, result.adapter[name].left)
        assert torch.equal(update.right, result.adapter[name].right)

    # Batches, the order of the tasks and how an absent module is said do not matter; one factor scales the whole merge.
    other, batch = given, 1
    options = [found for spec in (recipe["space"], *recipe["steps"]) for found in spec.values()]
    anyhow = {"singular": False} in options and not METHODS[recipe["method"]].unitary  # in any basis: it sees the order
    if {"span": False} not in options and not anyhow:  # arbitrary vectors
        batch = 8
        other = {
            key: Adapter.from_updates({n: a.get(n, LowRank.zeros(*SHAPES[n])) for n in SHAPES}, name=key)
            for key, a in reversed(given.items())
        }
    same(run(given, recipe | {"scale": -2.5}, batch=batch), result, -2.5)
    auto = run(other, recipe | {"scale": "auto"})
    same(auto, result, auto.report.scale)
    modules = auto.report.modules.values()
    ratios = (m.norm / m.input_norm for m in modules), (m.energy**0.5 / m.input_frobenius for m in modules)
    spectral, frobenius = (auto.report.scale * sum(listed) / len(modules) for listed in ratios)
    assert spectral * frobenius == pytest.approx(1)


@pytest.mark.parametrize("steps", UNITARY_STEPS, ids=label)
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].unitary])
def test_unitary_methods_do_not_see_space_gauge_or_rotation(method: str, steps: tuple) -> None:
    recipe = {"method": method, "parameters": examples(METHODS[method]), "steps": steps}
    results = [run(adapters(), recipe | {"space": space}) for space in PLAIN_SPACES]
    for other in results[1:]:
        same(results[0], other)
    turn = {name: (orthogonal(m, 1), orthogonal(n, 2)) for name, (m, n) in SHAPES.items()}
    turned = run(mapped(lambda name, u: LowRank(turn[name][0] @ u.left, u.right @ turn[name][1])), recipe)
    for name, (p, q) in turn.items():
        close(turned.adapter[name].dense(), p @ results[0].adapter[name].dense() @ q, tol=1e-8)
    same(results[0], run(mapped(lambda _, u: regauged(u)), recipe))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("settings", [{"basis": "balanced"}, {"steps": ("balance",)}], ids=["basis", "step"])
def test_balanced_factors_leave_no_gauge(method: str, settings: dict) -> None:
    recipe = {"method": method, "parameters": examples(METHODS[method])} | settings
    same(run(adapters(), recipe), run(mapped(lambda _, u: regauged(u)), recipe))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].elementwise])
def test_elementwise_methods_see_the_gauge_in_the_stacked_basis(method: str) -> None:
    few = {"density": 0.5} if "density" in METHODS[method].parameters else {}  # of cores this small
    recipe = {"method": method, "parameters": examples(METHODS[method]) | few}
    one, other = (run(g, recipe).adapter["long"].dense() for g in (adapters(), mapped(lambda _, u: regauged(u))))
    assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("space", SPACE_SPECS, ids=label)
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].linear])
def test_linear_methods_are_the_identity_on_one_adapter(space: Spec, method: str) -> None:
    given = {"a": adapters()["a"]}
    recipe = {"space": space, "method": method, "parameters": examples(METHODS[method])}
    plain, auto = (run(given, recipe | {"scale": scale}) for scale in (1.0, "auto"))
    share = 1 / auto.report.scale  # of its only input, where a method takes less of each than all
    for name, update in given["a"].items():
        close(auto.adapter[name].dense(), update.dense(), tol=1e-13)
        close(plain.adapter[name].dense(), share * update.dense(), tol=1e-13)


@pytest.mark.parametrize("space", PLAIN_SPACES, ids=label)  # scaled=false divides by what may be small
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].continuous])
def test_a_small_change_of_the_inputs_is_a_small_change_of_the_merge(space: Spec, method: str) -> None:
    recipe = {"space": space, "method": method, "parameters": examples(METHODS[method])}
    plain = dense(run(adapters(), recipe).adapter)
    for size in (1e-3, 1e-5, 1e-7):
        draw = normal(8)

        def moved(_: str, update: LowRank, draw=draw, size=size) -> LowRank:
            noise = [(x, draw(*x.shape)) for x in (update.left, update.right)]
            return LowRank(*(x + size * x.norm() * y / y.norm().clamp_min(1) for x, y in noise))

        for name, update in dense(run(mapped(moved), recipe).adapter).items():
            assert (update - plain[name]).norm() < 200 * size * max(1.0, float(plain[name].norm()))


def test_declarations_are_consistent() -> None:
    for name in METHODS:
        entry = METHODS[name]
        assert entry.unitary != entry.elementwise
        assert entry.unitary or not entry.linear
        assert entry.help
        assert entry.source
