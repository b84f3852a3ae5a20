import torch

import oracles
from laws import LowRank, close, lowrank, merged, regauged


def test_it_keeps_the_nuclear_norm_and_the_fewest_directions() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    update = LowRank(torch.eye(6, 4, dtype=torch.float64) * values, torch.eye(4, 5, dtype=torch.float64))
    for keep, expected in ((0.4, [10.0]), (0.41, [40 / 7, 30 / 7]), (0.9, [40 / 9, 30 / 9, 20 / 9]), (1, values)):
        found = torch.linalg.svdvals(merged([update], method="sum", steps=[{"star": {"keep": keep}}]))
        close(found[: len(expected)], torch.as_tensor(expected, dtype=torch.float64))
        assert found[len(expected) :].abs().max() < 1e-12


def test_each_update_by_itself_whatever_its_factors() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    expected = sum(oracles.star(update.dense(), 0.5) for update in updates)
    close(merged(updates, method="sum", steps=["star:keep=0.5"]), expected)
    close(merged([regauged(update) for update in updates], method="sum", steps=["star:keep=0.5"]), expected)


def test_nothing_stays_nothing() -> None:
    for update in (0.0 * lowrank(4, 3, 2), LowRank.zeros(4, 3)):
        assert merged([update, update], method="sum", steps=["star"]).abs().max() == 0
