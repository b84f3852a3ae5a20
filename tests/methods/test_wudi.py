import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracles
from laws import LowRank, close, largest, lowrank, merged, normal, orthogonal, stacks


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@given(updates=stacks(kinds=("plain", "same right", "same left", "zero", "empty")))
def test_it_is_the_normal_equations_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.wudi([u.dense() for u in updates])
    close(merged(updates, method="wudi", space=space), expected, largest(updates) * 4, tol=1e-5)


def objective(x: Tensor, updates: list[LowRank]) -> float:
    return sum(float(((x - u.dense()) @ u.dense().T).norm() ** 2 / u.dense().norm() ** 2) for u in updates)


def test_nothing_near_is_better() -> None:
    updates, draw = [lowrank(9, 7, 3, seed=s) for s in range(4)], normal(5)
    found = merged(updates, method="wudi")
    assert objective(found, updates) < objective(sum(u.dense() for u in updates), updates)
    for size in (1e-1, 1e-3):
        assert objective(found, updates) < objective(found + size * draw(9, 7), updates)


def test_rows_that_no_other_has_are_kept_whole() -> None:
    v = orthogonal(8)
    updates = [LowRank(lowrank(9, 8, 3).left, v[:3]), LowRank(lowrank(9, 8, 2, seed=1).left, v[3:5])]
    close(merged(updates, method="wudi"), sum(u.dense() for u in updates))


def test_the_strength_of_a_task_is_its_own() -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(2)]
    close(merged([1e6 * u for u in updates], method="wudi"), 1e6 * merged(updates, method="wudi"))
    close(merged([*updates, LowRank.zeros(9, 7)], method="wudi"), merged(updates, method="wudi"))
    assert torch.equal(merged([LowRank.zeros(4, 3)] * 2, method="wudi"), torch.zeros(4, 3, dtype=torch.float64))
