import pytest
import torch
from hypothesis import given

import oracles
from coremerge.errors import ConfigError
from laws import LowRank, close, largest, lowrank, merged, stacks

KINDS = ("plain", "same right", "same left", "deficient", "deficient right", "zero", "empty")


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@given(updates=stacks(kinds=KINDS))
def test_it_is_the_oracle_in_every_space(space: str, updates: list[LowRank]) -> None:
    expected = oracles.soften(oracles.sum_([u.dense() for u in updates]), 0.3)
    close(merged(updates, method="sum", space=space, steps=["soften:p=0.3"]), expected, largest(updates) * 4, tol=1e-6)


def test_the_ends_are_nothing_and_isotropize() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    for method in ("sum", "tsv"):
        plain, flat = (merged(updates, method=method, steps=steps) for steps in ([], ["isotropize"]))
        close(merged(updates, method=method, steps=["soften:p=1"]), plain)
        close(merged(updates, method=method, steps=["soften:p=0"]), flat)


def test_the_nuclear_norm_stays_and_ratios_shrink() -> None:
    updates = [lowrank(30, 20, r, seed=r) for r in (2, 3)]
    before = torch.linalg.svdvals(merged(updates, method="sum"))[:5]
    after = torch.linalg.svdvals(merged(updates, method="sum", steps=["soften"]))[:5]
    close(after / after[0], (before / before[0]).sqrt())
    close(after.sum(), before.sum())


def test_sizes_beyond_squares_do_not_matter() -> None:
    update = lowrank(9, 7, 3)
    close(
        merged([1e120 * update], method="sum", steps=["soften"]) / 1e120,
        merged([update], method="sum", steps=["soften"]),
    )


def test_what_is_no_power_is_refused() -> None:
    for p in ("2", "-1", "nan"):
        with pytest.raises(ConfigError, match="not a value that step 'soften' takes"):
            merged([lowrank(4, 3, 2)], method="sum", steps=[f"soften:p={p}"])
