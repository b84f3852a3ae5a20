import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, stacks

ISO = {"steps": ["isotropize"]}


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "full"])
@given(updates=stacks(kinds=("plain", "same right", "same left", "deficient", "deficient right", "zero", "empty")))
def test_iso_c_is_the_oracle_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.isotropize(oracles.sum_([u.dense() for u in updates]))
    close(merged(updates, method="sum", space=space, **ISO), expected, largest(updates) * 4, tol=1e-6)


@given(stacks(kinds=("plain",), low=6))
def test_tsv_then_isotropize_is_two_polar_factors(updates: list[LowRank]) -> None:
    if sum(u.rank for u in updates) > min(updates[0].shape):
        return
    us, ss, vs = zip(*(oracles.thin(u.dense()) for u in updates), strict=True)
    closed = torch.cat(ss).mean() * oracles.polar(torch.cat(us, 1)) @ oracles.polar(torch.cat(vs, 0))
    close(merged(updates, method="tsv", **ISO), closed, tol=1e-6)


def test_the_spectrum_is_flat_over_the_rank_and_keeps_its_mean() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    before = torch.linalg.svdvals(merged(updates, method="sum"))[:5]
    after = torch.linalg.svdvals(merged(updates, method="sum", **ISO))
    close(after, torch.cat([before.mean().expand(5), torch.zeros(2)]))


def test_twice_is_once() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    for method in ("sum", "tsv", "ties"):
        close(merged(updates, method=method, **ISO), merged(updates, method=method, steps=["isotropize", "isotropize"]))


@pytest.mark.parametrize("method", ["sum", "tsv"])
def test_over_all_directions_as_published_in_weight_space(method: str) -> None:
    """The added directions are arbitrary: spectrum and norm are not, nor what is done to the span."""
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 2)]
    plain = merged(updates, method=method)
    spread = merged(updates, method=method, space="full", steps=["isotropize:span=false"])
    theirs = oracles.isotropize(plain, span=False)
    close(torch.linalg.svdvals(spread), torch.linalg.svdvals(theirs))
    close(torch.linalg.svdvals(spread), torch.linalg.svdvals(plain).mean().expand(7))
    u, _, vh = oracles.thin(plain)
    close(u.T @ spread @ vh.T, u.T @ theirs @ vh.T)


def test_in_core_all_directions_are_those_of_the_core() -> None:
    updates = [lowrank(20, 16, 2), LowRank(lowrank(20, 16, 2).left, lowrank(20, 16, 2, seed=1).right)]  # core 2 × 4
    values = torch.linalg.svdvals(merged(updates, method="sum", steps=["isotropize:span=false"]))
    assert (values > 1e-9).sum() == 2


def test_nothing_stays_nothing() -> None:
    zero = 0.0 * lowrank(4, 3, 2)
    for step in ("isotropize", "isotropize:span=false"):
        assert merged([zero, zero], method="sum", steps=[step]).abs().max() == 0
    assert merged([LowRank.zeros(4, 3)], method="sum", steps=["isotropize"]).abs().max() == 0
