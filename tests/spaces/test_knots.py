import torch
from hypothesis import given

import oracles
from coremerge.spaces import SPACES
from laws import LowRank, close, largest, lowrank, stacks


@given(stacks(kinds=("plain", "deficient", "deficient right", "same left", "same right", "zero")))
def test_cores_are_those_of_the_dense_svd_up_to_signs(updates: list[LowRank]) -> None:
    _, s, vs = oracles.knots_space([u.dense() for u in updates])
    coordinates = SPACES.build("knots")(updates)
    unscaled = SPACES.build("knots:scaled=false")(updates)
    assert coordinates.rows is None
    close(unscaled.rows, s, largest(updates) * 12)
    for core, other, v in zip(coordinates.cores, unscaled.cores, vs, strict=True):
        close(core.dense().abs(), (s[:, None] * v).abs(), largest(updates) * 12, tol=1e-7)
        close(other.dense(), core.dense(), largest(updates))


def test_the_small_svd_replaces_the_dense_one_exactly() -> None:
    updates = [lowrank(8, 11, r, seed=r) for r in (1, 3)]
    u, _, _ = oracles.knots_space([x.dense() for x in updates])
    coordinates = SPACES.build("knots")(updates)
    eye = LowRank(torch.eye(4).double(), coordinates.cores[0].right.new_zeros(4, 11))
    close(coordinates.lift(eye, updates).left.abs(), u.abs())
