import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, stacks


@given(updates=stacks(kinds=("plain", "same right", "same left"), tasks=(2, 4)))
def test_it_is_the_oracle_in_full_space(updates: list[LowRank]) -> None:
    expected = oracles.sce([u.dense() for u in updates], 0.4)
    close(merged(updates, method="sce", space="full", parameters={"select": 0.4}), expected, largest(updates))


def test_a_task_counts_by_its_square() -> None:
    update = lowrank(9, 7, 3)
    found = merged([3 * update, update], method="sce", space="full", parameters={"select": 1})
    close(found, (0.9 * 3 + 0.1) * update.dense())


def test_entries_against_the_majority_are_erased() -> None:
    one = LowRank(torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    found = merged([one, one, -0.5 * one], method="sce", space="full", parameters={"select": 1})
    close(found, one.dense())
