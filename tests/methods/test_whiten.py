import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, orthogonal, stacks


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@given(updates=stacks(kinds=("plain", "same right", "same left", "duplicate", "zero", "empty")))
def test_it_is_the_formula_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.whiten([u.dense() for u in updates])
    close(merged(updates, method="whiten", space=space), expected, largest(updates), tol=1e-6)


def test_a_large_ridge_is_the_sum_and_a_small_one_tsv() -> None:
    u, v = orthogonal(12), orthogonal(12, seed=1)
    mixed = orthogonal(12, seed=2)
    updates = [LowRank(u[:, :3], v[:3]), LowRank((u @ mixed)[:, :3], (mixed @ v)[:3])]  # all strengths alike
    close(merged(updates, method="whiten", parameters={"ridge": 1e9}), sum(x.dense() for x in updates), tol=1e-6)
    close(merged(updates, method="whiten", parameters={"ridge": 1e-12}), merged(updates, method="tsv"), tol=1e-6)


def test_what_all_share_is_counted_once() -> None:
    update = lowrank(9, 7, 3)
    for count in (2, 5):
        once = merged([update] * count, method="whiten", parameters={"ridge": 1e-9})
        close(once, update.dense(), tol=1e-6)


def test_a_direction_that_fades_pushes_none_aside() -> None:
    u, v = orthogonal(9), orthogonal(7, seed=1)
    strong = LowRank(u[:, :1], v[:1])
    leaning = LowRank((u[:, :1] + u[:, 1:2]) / 2**0.5, (v[:1] + v[1:2]) / 2**0.5)
    before = torch.inf
    for size in (1e-2, 1e-3, 1e-4, 1e-5):
        moved = float((merged([strong, size * leaning], method="whiten") - strong.dense()).norm())
        assert moved < before / 3
        before = moved
    assert before < 100 * 1e-5
