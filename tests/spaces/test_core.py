import torch
from hypothesis import given

import oracles
from coremerge.spaces import SPACES
from laws import LowRank, close, largest, lowrank, normal, regauged, stacks

GENERIC = ("plain", "deficient", "deficient right", "same right", "same left")


@given(stacks())
def test_stacked_cores_are_those_of_definition_1(updates: list[LowRank]) -> None:
    ours = [c.dense() for c in SPACES.build("core")(updates).cores]
    theirs = oracles.core_space([u.left for u in updates], [u.right for u in updates])[2]
    assert ours[0].shape == theirs[0].shape
    for a, b in zip(ours, theirs, strict=True):
        close(torch.linalg.svdvals(a), torch.linalg.svdvals(b), largest(updates) * 12)


@given(stacks(kinds=GENERIC, low=6))
def test_stacked_cores_agree_entry_by_entry_up_to_signs(updates: list[LowRank]) -> None:
    ours = [c.dense() for c in SPACES.build("core")(updates).cores]
    theirs = oracles.core_space([u.left for u in updates], [u.right for u in updates])[2]
    for a, b in zip(ours, theirs, strict=True):
        close(a.abs(), b.abs(), largest(updates), tol=1e-6)


def test_balanced_cores_are_those_of_balanced_factors_and_forget_the_gauge() -> None:
    updates = [lowrank(9, 7, r, seed=r) for r in (2, 3)]
    factors = [oracles.balanced(u.dense()) for u in updates]
    theirs = oracles.core_space([a for a, _ in factors], [b for _, b in factors])[2]
    for given_ in (updates, [regauged(u) for u in updates]):
        ours = SPACES.build("core:basis=balanced")(given_).cores
        for a, b in zip(ours, theirs, strict=True):
            close(a.dense().abs(), b.abs(), tol=1e-7)


def test_shared_right_factors_give_a_core_as_wide_as_one_of_them() -> None:
    draw = normal()
    right = draw(4, 30)
    cores = SPACES.build("core")([LowRank(draw(20, 4), right) for _ in range(3)]).cores
    assert cores[0].shape == (12, 4)


def test_rtol_says_what_is_cut_on_either_side() -> None:
    weak = lowrank(9, 7, 2, seed=1)
    updates = [lowrank(9, 7, 2), LowRank(1e-5 * weak.left, 1e-5 * weak.right)]
    assert SPACES.build("core")(updates).cores[0].shape == (4, 4)
    assert SPACES.build("core:rtol=1e-3")(updates).cores[0].shape == (2, 2)


def test_a_zero_update_has_a_core_of_exactly_zero() -> None:
    zero = LowRank(torch.zeros(9, 2).double(), normal()(2, 7))
    for space in ("core", "core:basis=balanced", "knots"):
        assert SPACES.build(space)([lowrank(9, 7, 3), zero]).cores[1].dense().abs().max() == 0
