"""Steps after ``lift`` act on whole updates, in any space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import oracles
from coremerge.adapter import Adapter
from coremerge.merging import merge
from coremerge.recipe import Recipe
from laws import LowRank, close, largest, lowrank, merged, named, run, stacks

SPREAD = ["lift", "isotropize:span=false"]


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "knots:scaled=false", "full"])
@given(updates=stacks(kinds=("plain", "same right", "same left", "duplicate", "zero", "empty")))
def test_it_changes_nothing_by_itself(space: str, updates: list[LowRank]) -> None:
    for steps in ([], ["isotropize"], ["truncate:rank=1"]):
        plain = merged(updates, method="ties", space=space, steps=steps)
        close(merged(updates, method="ties", space=space, steps=["lift", *steps]), plain, largest(updates), tol=1e-6)


def knots_with_iso(deltas: list[torch.Tensor], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As published: [Δ_1 … Δ_T] = U S [V_1 … V_T], TIES of the S V_t, times U; of that the SVD with all min(m, n).

    What there is without the flattening, and with it.
    """
    u, s, vs = oracles.knots_space(deltas)
    whole = u @ oracles.ties([s[:, None] * v for v in vs], density)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return whole, values.mean() * left @ right


@pytest.mark.parametrize("shape", [(20, 16), (16, 20)])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_published_knots_with_iso_has_null_directions(shape: tuple[int, int], density: float) -> None:
    """They are arbitrary, there and here; the spectrum is not, nor what is done to the span of the merge."""
    updates = [lowrank(*shape, 2, seed=s) for s in range(3)]
    how = {"method": "ties", "space": "knots", "parameters": {"density": density}}
    found = merged(updates, steps=SPREAD, **how)
    plain, theirs = knots_with_iso([u.dense() for u in updates], density)
    close(torch.linalg.svdvals(found), torch.linalg.svdvals(theirs))
    left, _, right = oracles.thin(plain)
    close(left.T @ found @ right.T, left.T @ theirs @ right.T, tol=1e-8)
    close(left @ left.T @ found, left @ left.T @ theirs, tol=1e-8)
    without = merged(updates, steps=SPREAD[1:], **how)  # over the six rows of the core
    assert int((torch.linalg.svdvals(without) > 1e-9).sum()) == 6
    assert int((torch.linalg.svdvals(found) > 1e-9).sum()) == 16


@pytest.mark.parametrize("space", ["core", "knots"])
def test_of_a_method_that_does_not_see_the_basis_it_is_that_of_full_space(space: str) -> None:
    updates = [lowrank(12, 9, 2, seed=s) for s in range(2)]
    found = merged(updates, method="tsv", space=space, steps=SPREAD)
    close(
        torch.linalg.svdvals(found), torch.linalg.svdvals(merged(updates, method="tsv", space="full", steps=SPREAD[1:]))
    )


def test_the_plan_and_the_report_know() -> None:
    given = named([lowrank(20, 16, 2, seed=s) for s in range(3)])
    result = run(given, method="ties", space="knots", steps=SPREAD)
    assert result.plan.rank == 16 == result.report.rank
    module = result.report.modules["layer"]
    assert module.energy == pytest.approx(float(result.adapter["layer"].dense().norm() ** 2))
    core = run(given, method="ties", space="knots", steps=SPREAD[1:])
    assert core.plan.rank == 6 and result.plan.resolved.is_full and not core.plan.resolved.is_full
    assert result.plan.peak_bytes() > core.plan.peak_bytes()
    assert run(given, method="sum", steps=["lift", "truncate:rank=3"]).plan.rank == 3


def test_batches_and_weights() -> None:
    given = {
        f"a{t}": Adapter.from_updates(
            {n: lowrank(9, 12, 2, seed=10 * t + i) for i, n in enumerate("xyz")}, name=f"a{t}"
        )
        for t in range(2)
    }
    recipe = Recipe(method="ties", space="knots", steps=["lift", "isotropize"], weights=[1.0, 0.3], scale=-2.0)
    plain = recipe.but(steps=["isotropize"])
    for name, update in merge(given, plain, threads=1, batch=1).adapter.items():
        close(merge(given, recipe, threads=1, batch=3).adapter[name].dense(), update.dense(), tol=1e-8)


@pytest.mark.parametrize("space", ["core", "knots", "full"])
def test_what_steps_before_it_made_of_directions_does_not_turn_them_into_errors(space: str) -> None:
    """Stored in half precision, and a hundred thousand times weaker: the errors are so, too."""
    weak = "lines:alpha=1e-5,beta=0"
    updates = [lowrank(30, 20, 3, seed=s) for s in range(2)]
    given = named([LowRank(u.left.half(), u.right.half()) for u in updates])
    before, after = (
        run(given, method="sum", space=space, steps=steps)
        for steps in ([weak, "lift", "isotropize"], ["lift", "isotropize", weak])
    )
    assert before.report.rank == after.report.rank == 6
    close(before.adapter["layer"].dense(), after.adapter["layer"].dense(), tol=1e-8)
