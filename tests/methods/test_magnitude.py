import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, stacks

GENERIC = ("plain", "same right", "same left", "duplicate")


@given(updates=stacks(kinds=GENERIC))
def test_magnitude_and_breadcrumbs_are_their_oracles_in_full_space(updates: list[LowRank]) -> None:
    dense = [u.dense() for u in updates]
    few = {"density": 0.3}
    close(
        merged(updates, method="magnitude", space="full", parameters=few),
        oracles.magnitude(dense, 0.3),
        largest(updates),
    )
    both = {"density": 0.5, "gamma": 0.2}
    found = merged(updates, method="breadcrumbs", space="full", parameters=both)
    close(found, oracles.breadcrumbs(dense, 0.5, 0.2), largest(updates))


def test_all_entries_are_the_sum() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    for method, parameters in (("magnitude", {"density": 1}), ("breadcrumbs", {"density": 1, "gamma": 0.5})):
        close(merged(updates, method=method, parameters=parameters), sum(u.dense() for u in updates))


def test_breadcrumbs_without_its_largest_entries_elects_like_ties() -> None:
    updates = [lowrank(9, 7, 3, seed=s) for s in range(3)]
    parameters = {"density": 0.4, "gamma": 0.0, "elect": True}
    found = merged(updates, method="breadcrumbs", space="full", parameters=parameters)
    close(found, oracles.ties([u.dense() for u in updates], 0.4))


def test_outliers_go_first() -> None:
    update = LowRank(
        torch.tensor([[100.0], [3.0], [2.0], [1.0]], dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    )
    parameters = {"density": 0.5, "gamma": 0.25}
    found = merged([update, 0.0 * update], method="breadcrumbs", space="full", parameters=parameters)
    close(found[:, 0], torch.tensor([0.0, 3.0, 2.0, 0.0], dtype=torch.float64))
