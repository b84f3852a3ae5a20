"""Laws of every space."""

import pytest
import torch
from hypothesis import given

from coremerge.registry import Spec
from coremerge.spaces import SPACES, Coordinates
from laws import SPACE_SPECS, LowRank, close, label, largest, lowrank, normal, orthogonal, stacks

every_space = pytest.mark.parametrize("space", SPACE_SPECS, ids=label)


def cores(c: Coordinates) -> list[torch.Tensor]:
    return [core.dense() for core in c.cores]


@every_space
@given(updates=stacks())
def test_nothing_is_lost(space: Spec, updates: list[LowRank]) -> None:
    coordinates, size = SPACES.build(space)(updates), largest(updates)
    for core, update in zip(coordinates.cores, updates, strict=True):
        close(coordinates.lift(core, updates).dense(), update.dense(), size)


@every_space
@given(updates=stacks())
def test_projection_and_lift_are_isometries(space: Spec, updates: list[LowRank]) -> None:
    coordinates, size = SPACES.build(space)(updates), largest(updates)
    for a, x in zip(coordinates.cores, updates, strict=True):
        for b, y in zip(coordinates.cores, updates, strict=True):
            close(a.inner(b), (x.dense() * y.dense()).sum(), 144 * size**2, tol=1e-8)
    some = lowrank(*coordinates.cores[0].shape, 2)
    lifted = coordinates.lift(some, updates)
    assert lifted.shape == updates[0].shape
    close(torch.linalg.svdvals(lifted.dense())[: some.svd.values.shape[0]], some.svd.values, tol=1e-6)


@every_space
@given(updates=stacks(tasks=(2, 3)))
def test_cores_follow_sums_and_scalars(space: Spec, updates: list[LowRank]) -> None:
    coordinates = SPACES.build(space)(updates)
    a, b = coordinates.cores[:2]
    close(
        coordinates.lift(2 * a - b, updates).dense(), 2 * updates[0].dense() - updates[1].dense(), 3 * largest(updates)
    )


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots", "knots:scaled=false"])
@given(updates=stacks())
def test_coordinates_are_never_larger_than_the_span(space: str, updates: list[LowRank]) -> None:
    p, q = SPACES.build(space)(updates).cores[0].shape
    dense = [u.dense() for u in updates]
    m, n = dense[0].shape
    width = sum(u.rank for u in updates)
    assert p <= min(m, width)
    assert q <= (n if space.startswith("knots") else min(n, width))
    if space in {"core:basis=balanced", "knots", "knots:scaled=false"} and width:
        assert p == sum(
            torch.linalg.svdvals(torch.cat(dense, 1)) > 1e-8 * torch.linalg.matrix_norm(torch.cat(dense, 1), 2)
        )


@every_space
def test_a_batch_is_its_elements(space: Spec) -> None:
    draw, project = normal(), SPACES.build(space)
    batch = [LowRank(draw(3, 7, r), draw(3, r, 9)) for r in (2, 3)]
    together = project(batch)
    for i in range(3):
        single = [LowRank(u.left[i], u.right[i]) for u in batch]
        alone = project(single)
        for a, b in zip(together.cores, alone.cores, strict=True):
            close(a.dense()[i].abs(), b.dense().abs(), tol=1e-8)
            close(together.lift(a, batch).dense()[i], alone.lift(b, single).dense())


def test_orthogonal_changes_of_weight_space_leave_core_as_it_is() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    p, q = orthogonal(9), orthogonal(7, 1)
    turned = [LowRank(p @ u.left, u.right @ q) for u in updates]
    for a, b in zip(cores(SPACES.build("core")(updates)), cores(SPACES.build("core")(turned)), strict=True):
        close(a.abs(), b.abs())
