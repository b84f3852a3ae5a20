from hypothesis import given
from hypothesis import strategies as st

import oracles
from laws import LowRank, close, largest, lowrank, merged, named, run, stacks


@given(stacks(), st.integers(1, 5), st.sampled_from(["core", "knots", "full"]))
def test_truncation_is_the_best_approximation(updates: list[LowRank], k: int, space: str) -> None:
    summed = oracles.sum_([u.dense() for u in updates])
    ours = merged(updates, method="sum", space=space, steps=[{"truncate": {"rank": k}}])
    best = oracles.truncate(summed, k)
    close((summed - ours).norm(), (summed - best).norm(), largest(updates) * 12, tol=1e-7)
    assert oracles.rank(ours) <= k


def test_the_place_in_the_list_matters() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    summed = oracles.sum_([u.dense() for u in updates])
    first = merged(updates, method="sum", steps=["truncate:rank=2", "isotropize"])
    close(first, oracles.isotropize(oracles.truncate(summed, 2)))
    last = run(named(updates), method="sum", steps=["isotropize", "truncate:rank=2"])
    assert last.adapter["layer"].rank == 2
    close(last.adapter["layer"].svd.values, oracles.isotropize(summed).svd()[1][:2])
