"""SCE: select, calculate, erase."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.recipe import Recipe, recipe_from
from laws import close, largest, lowrank, make, merged, named, normal, orthogonal, run, stacks

GENERIC = ("plain", "same right", "same left")
FULL = {"method": "sce", "space": "full"}


@given(stacks(kinds=GENERIC, low=5, tasks=(2, 4)), st.sampled_from([0.1, 0.4, 1.0]))
def test_it_is_its_oracle_in_full_space(updates: list[LowRank], share: float) -> None:
    found = merged(updates, **FULL, parameters={"select_topk": share})
    close(found, oracles.sce([u.dense() for u in updates], share), largest(updates), tol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
def test_it_is_mergekits(share: float) -> None:
    sce_merge = pytest.importorskip("mergekit.merge_methods.sce").sce_merge
    updates = [lowrank(14, 11, 3, seed=s) for s in range(4)]
    base = normal(9)(14, 11)
    entry = lambda x: SimpleNamespace(tensor=x)  # noqa: E731
    group = SimpleNamespace(base=entry(base), non_base=[entry(base + u.dense()) for u in updates])
    theirs = getattr(sce_merge, "merge_group", sce_merge)(group, select_topk=share, int8_mask=False) - base
    close(merged(updates, **FULL, parameters={"select_topk": share}), theirs, tol=1e-8)


def test_mergekits_recipes_are_read() -> None:
    given = {"merge_method": "sce", "base_model": "base", "models": ["a", "b"], "parameters": {"select_topk": 0.2}}
    file = recipe_from(given | {"dtype": "bfloat16"})
    assert (file.recipe.method, file.recipe.parameters) == ("sce", {"select_topk": 0.2})
    assert file.models == ("a", "b") and file.base_model == "base"
    assert recipe_from({"merge_method": "sce"}).recipe.resolve().method.values == {"select_topk": 1.0}
    with pytest.raises(ConfigError, match="select_topk"):
        Recipe(method="sce", parameters={"select_topk": 0})


def test_a_task_counts_by_its_squares() -> None:
    update = lowrank(7, 6, 2)
    found = merged([3 * update, update + lowrank(7, 6, 1, seed=5) * 1e-6], **FULL)
    close(found, (9 * 3 + 1) / 10 * update.dense(), tol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_noise_of_a_deficient_update_changes_nothing_after_balance(space: str, share: float) -> None:
    """Its zero directions come back as 1e-16 of the largest: they neither count, nor vary, nor vote."""
    for seed in (11, 39, 40):
        deficient = make("deficient", 9, 7, 3, normal(seed), [])
        u, s, vh = torch.linalg.svd(deficient.dense())
        true = LowRank(u[:, :1] * s[:1], vh[:1])
        others = lowrank(9, 7, 3, seed=1), lowrank(9, 7, 2, seed=2)
        how = {"method": "sce", "space": space, "steps": ["balance"], "parameters": {"select_topk": share}}
        exact, found = (merged([others[0], one, others[1]], **how) for one in (true, deficient))
        close(found, exact, tol=1e-8)
        noisy = merged([others[0], deficient + lowrank(9, 7, 1, seed=3) * 1e-17, others[1]], **how)
        close(noisy, exact, tol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_rows_that_nobody_writes_are_not_selected(share: float) -> None:
    """In other coordinates they are 1e-17, and as many as they are would be the share of what varies."""
    turn = orthogonal(9, 5)
    rows = torch.zeros(9, 1, dtype=torch.float64)
    rows[:3] = 1
    updates = [LowRank(u.left * rows, u.right) for u in (lowrank(9, 7, 2, seed=s) for s in range(3))]
    there_and_back = [LowRank(turn.T @ (turn @ u.left), u.right) for u in updates]
    how = {**FULL, "parameters": {"select_topk": share}}
    close(merged(there_and_back, **how), merged(updates, **how), tol=1e-8)
    close(merged(there_and_back, **how), oracles.sce([u.dense() for u in updates], share), tol=1e-8)


def test_copies_that_were_stored_in_fewer_digits_do_not_vary() -> None:
    """Where only rounding differs between two of three, the third alone is what varies."""
    one, third = lowrank(9, 7, 2, seed=1), lowrank(9, 7, 2, seed=2)
    half = LowRank(one.left.to(torch.float16), one.right.to(torch.float16))
    whole = LowRank(half.left.double(), half.right.double())
    parameters = {"select_topk": 0.5}
    found = [
        merge(named([x, whole, third]), Recipe(**FULL, parameters=parameters, scale=1.0), threads=1).adapter
        for x in (half, whole)
    ]
    close(found[0]["layer"].dense(), found[1]["layer"].dense(), tol=1e-8)


def test_one_adapter_and_copies_come_back() -> None:
    a = lowrank(8, 6, 2)
    for some in ([a], [a, a], [a, LowRank.zeros(8, 6)]):
        close(merged(some, method="sce"), a.dense())
        assert run(named(some), method="sce").report.alone == 1
    close(merged([a], method="sce", parameters={"select_topk": 0.2}), a.dense())  # nothing varies


@pytest.mark.parametrize("factor", [1e-80, -1e80])
def test_it_does_not_depend_on_scale(factor: float) -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    how = {"method": "sce", "parameters": {"select_topk": 0.3}}
    close(merged([u * factor for u in updates], **how) / factor, merged(updates, **how), tol=1e-8)
