import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, named, orthogonal, run, stacks


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


def test_adapters_that_are_not_there_change_nothing() -> None:
    updates = [lowrank(14, 12, 4, seed=s) for s in (0, 1)]
    plain = merged(updates, method="cts")
    assert torch.linalg.matrix_rank(plain, rtol=1e-9) == 8
    for count in (1, 2, 6):
        close(merged([*updates, *[LowRank.zeros(14, 12)] * count], method="cts"), plain)
    close(merged([*updates, lowrank(14, 12, 4, seed=7)], method="cts", weights=[1, 1, 0]), plain)


def test_what_rounding_left_outside_is_no_direction() -> None:
    """One task lies in the directions that the sum has first: outside of them are the errors of its bfloat16 alone."""
    u, v = orthogonal(256)[:, :12], orthogonal(256, 1)[:, :12]
    left, right = torch.cat([u[:, :4] * 10, u[:, 8:]], 1), torch.cat([v[:, :4], v[:, 8:]], 1).T
    factors = [(u[:, :8] * 10, v[:, :8].T), (left, right)]
    turns = [orthogonal(8, seed) for seed in (2, 3)]
    stored = [
        LowRank((a @ turn).bfloat16(), (turn.T @ b).bfloat16()) for (a, b), turn in zip(factors, turns, strict=True)
    ]
    total = sum(x.dense().double() for x in stored)
    found = run(named(stored), method="cts", dtype="float64").adapter["layer"].dense()
    assert (found * total).sum() > 0.999 * found.norm() * total.norm()
