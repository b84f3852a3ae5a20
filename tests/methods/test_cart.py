import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from laws import LowRank, close, largest, lowrank, merged, stacks


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "full"])
@given(updates=stacks(), rank=st.integers(1, 4), scale=st.sampled_from([0.1, 1.0, -3.0]))
def test_cart_is_the_oracle_in_every_space(space: str, updates: list[LowRank], rank: int, scale: float) -> None:
    ours = merged(updates, method="cart", space=space, parameters={"rank": rank, "scale": scale})
    expected = oracles.cart([u.dense() for u in updates], rank, scale)
    close(ours, expected, largest(updates) * 12, tol=1e-7)


def test_all_of_the_deviations_leave_the_mean() -> None:
    """They sum to zero, so that only the cut makes CART differ from the mean."""
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    mean = merged(updates, method="mean")
    close(merged(updates, method="cart", parameters={"rank": 7}), mean)
    close(merged(updates, method="cart", parameters={"scale": 0}), mean)


def test_cart_of_duplicates_is_one_of_them() -> None:
    a = lowrank(9, 7, 3)
    for count in (1, 2, 3):
        close(merged([a] * count, method="cart", parameters={"rank": 2}), a.dense())
