import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, stacks

SPACES = ("core", "knots", "full")


@given(stacks())
def test_sums_are_equal_in_every_space(updates: list[LowRank]) -> None:
    xs = [u.dense() for u in updates]
    for space in SPACES:
        close(merged(updates, method="sum", space=space), oracles.sum_(xs), largest(updates) * 4)
        close(merged(updates, method="mean", space=space), oracles.mean(xs), largest(updates))


def test_weights_scale_the_terms() -> None:
    a, b = lowrank(6, 5, 2), lowrank(6, 5, 3, seed=1)
    expected = 0.3 * a.dense() - 2 * b.dense()
    close(merged([a, b], method="sum", weights=[0.3, -2]), expected)
    close(merged([a, b], method="mean", weights=[0.3, -2]), expected / 2)


def test_the_mean_of_duplicates_is_one_of_them() -> None:
    a = lowrank(6, 5, 2)
    close(merged([a, a, a], method="mean"), a.dense())
    close(merged([a, a, a], method="sum"), 3 * a.dense())


def test_what_cancels_is_gone() -> None:
    a = lowrank(6, 5, 2)
    close(merged([a, a], method="sum", weights=[1, -1]), torch.zeros(6, 5).double(), 1.0)
    close(merged([a, a], method="sum", weights=[1, -1], scale="auto"), torch.zeros(6, 5).double(), 1.0)
