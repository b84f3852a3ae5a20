import pytest
import torch

import oracles
from coremerge import Adapter, Recipe, merge
from coremerge.linalg import RaggedRankError
from coremerge.steps.star import star
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


@pytest.mark.parametrize("batch", [1, 8])
def test_modules_of_one_shape_may_keep_different_numbers_of_directions(batch: int) -> None:
    flat, steep = (torch.tensor(v, dtype=torch.float64) for v in ([1.2, 1.1, 1.0], [9.0, 0.2, 0.1]))
    modules = {
        str(i): LowRank(torch.eye(6, 3).double() * v, torch.eye(3, 5).double()) for i, v in enumerate((flat, steep))
    }
    given = {name: Adapter.from_updates(modules) for name in "ab"}
    merge_of = merge(given, Recipe(method="sum", steps=["star"], scale=1.0), threads=1, batch=batch).adapter
    assert [merge_of[name].svd.rank() for name in modules] == [2, 1]
    for name, update in modules.items():
        close(merge_of[name].dense(), 2 * oracles.star(update.dense()))


def test_a_batch_of_different_counts_is_said() -> None:
    values = torch.tensor([[1.2, 1.1, 1.0], [9.0, 0.2, 0.1]], dtype=torch.float64)
    batch = LowRank(torch.eye(6, 3).double() * values[:, None], torch.eye(3, 5).double().expand(2, -1, -1))
    with pytest.raises(RaggedRankError):
        star(0.4).apply(batch)
    close(star(0.4).apply(LowRank(batch.left[:1], batch.right[:1])).dense()[0], oracles.star(batch.dense()[0]))
