import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, orthogonal, stacks


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@given(updates=stacks(kinds=("plain", "same left", "tiny", "zero", "empty")))
def test_it_is_the_rank_counted_oracle_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.cts([u.dense() for u in updates], 0.5)
    close(
        merged(updates, method="cts", space=space, parameters={"common": 0.5}), expected, largest(updates) * 4, tol=1e-6
    )


def test_all_in_common_is_the_sum() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    close(merged(updates, method="cts", parameters={"common": 1}), sum(u.dense() for u in updates))


def test_a_task_keeps_a_direction_that_the_sum_has_last() -> None:
    """A weak task beside a strong one, side by side: the sum's first four directions are all the strong one's."""
    u, v = orthogonal(12), orthogonal(10, 1)
    strong, weak = LowRank(u[:, :4] * 5, v[:4]), LowRank(u[:, 4:8] * 0.1, v[4:8])
    found = merged([strong, weak], method="cts", parameters={"common": 0.5}, steps=["isotropize"])
    close(torch.linalg.svdvals(found)[:6], torch.full((6,), (20 + 0.2) / 6, dtype=torch.float64))
    kept = u[:, 4:8].T @ found @ v[4:8].T
    assert torch.linalg.matrix_rank(kept, rtol=1e-9) == 2  # of the weak one's four


def test_with_isotropize_it_has_one_singular_value_for_all_that_it_kept() -> None:
    updates = [lowrank(20, 16, 4, seed=s) for s in (0, 1)]
    plain = torch.linalg.svdvals(merged(updates, method="cts"))
    flat = torch.linalg.svdvals(merged(updates, method="cts", steps=["isotropize"]))
    close(flat[:8], plain[:8].mean().expand(8))


def test_one_adapter_is_itself() -> None:
    close(merged([lowrank(9, 7, 3)], method="cts"), lowrank(9, 7, 3).dense())
