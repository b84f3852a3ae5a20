import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, normal, orthogonal, stacks

MIXED = (
    "plain",
    "deficient",
    "deficient right",
    "duplicate",
    "same right",
    "same left",
    "zero",
    "empty",
    "tiny",
    "skewed",
)


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "full"])
@given(updates=stacks(kinds=MIXED))
def test_tsv_is_the_rank_counted_oracle_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.tsv([u.dense() for u in updates])
    close(merged(updates, method="tsv", space=space), expected, largest(updates) * 4, tol=1e-6)


def test_tsv_of_one_adapter_and_of_duplicates_is_the_adapter() -> None:
    a = lowrank(9, 7, 3)
    for count in (1, 2, 3):
        close(merged([a] * count, method="tsv"), a.dense())


def test_tsv_of_orthogonal_updates_is_their_sum() -> None:
    u, v = orthogonal(9), orthogonal(8, 1)
    updates = [LowRank(u[:, :3] * 2, v[:3]), LowRank(u[:, 3:5], v[3:5] * 5)]
    close(merged(updates, method="tsv"), sum(x.dense() for x in updates))


def test_singular_values_are_kept() -> None:
    updates = [lowrank(30, 20, r, seed=r) for r in (2, 3)]
    both = torch.cat([u.svd.values for u in updates]).sort(descending=True).values
    close(torch.linalg.svdvals(merged(updates, method="tsv"))[:5], both)


def test_a_given_rank_takes_the_leading_ones() -> None:
    updates = [lowrank(12, 10, r, seed=r) for r in (3, 4)]
    for space in ("core", "knots", "full"):
        ours = merged(updates, method="tsv", space=space, parameters={"rank": 2})
        close(ours, oracles.tsv([u.dense() for u in updates], 2))


def test_a_rank_above_the_numerical_one_takes_null_vectors_as_published() -> None:
    """min(m, n)/T vectors per task, most of them arbitrary: only what they leave alone can be compared."""
    updates = [lowrank(12, 10, 2, seed=s) for s in (0, 1)]
    ours = merged(updates, method="tsv", space="full", parameters={"rank": 5, "pad": True})
    values = torch.cat([torch.linalg.svdvals(u.dense())[:5] for u in updates]).sort(descending=True).values
    close(torch.linalg.svdvals(ours)[:10], values, tol=1e-7)  # ten orthonormal columns on either side
    cut = merged(updates, method="tsv", space="full")
    assert (ours - cut).norm() > 1e-2 * cut.norm()


def test_an_update_of_rounding_error_claims_no_direction() -> None:
    a, noise = lowrank(9, 7, 3), LowRank(normal(5)(9, 2) * 1e-14, normal(6)(2, 7))
    for space in ("core", "full"):
        close(merged([a, noise], method="tsv", space=space), a.dense())
        zeroed = merged([a, lowrank(9, 7, 2, seed=3)], method="tsv", space=space, weights=[1, 0])
        close(zeroed, a.dense())


def test_weights_scale_the_spectra() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    weighted = oracles.tsv([0.5 * updates[0].dense(), -2 * updates[1].dense()])
    close(merged(updates, method="tsv", weights=[0.5, -2]), weighted)


def test_nothing_at_all() -> None:
    empty = [LowRank.zeros(4, 3), LowRank.zeros(4, 3)]
    assert merged(empty, method="tsv").abs().max() == 0
    assert merged([0.0 * lowrank(4, 3, 2)], method="tsv", steps=["isotropize"]).abs().max() == 0


def test_a_rank_above_a_task_s_own_takes_what_there_is():
    updates = [lowrank(9, 7, 2, seed=1), lowrank(9, 7, 3, seed=2)]
    close(merged(updates, method="tsv", parameters={"rank": 6}), merged(updates, method="tsv"))
