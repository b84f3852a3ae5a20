import torch

from coremerge.spaces import SPACES
from laws import lowrank


def test_cores_are_the_updates_themselves() -> None:
    updates = [lowrank(5, 4, r, seed=r) for r in (1, 2)]
    coordinates = SPACES.build("full")(updates)
    assert coordinates.cores == tuple(updates)
    assert torch.equal(coordinates.lift(updates[0], updates).dense(), updates[0].dense())
