import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from coremerge.errors import ConfigError
from coremerge.methods.ties import elect, trim
from coremerge.recipe import Recipe
from coremerge.spaces import SPACES
from laws import LowRank, close, largest, lowrank, make, merged, normal, stacks

GENERIC = ("plain", "same right", "same left", "duplicate")
densities = st.sampled_from([0.05, 0.2, 0.5, 1.0])


@given(stacks(), densities, st.sampled_from(["mean", "sum"]))
def test_ties_in_weight_space_is_the_oracle(updates: list[LowRank], density: float, reduce: str) -> None:
    ours = merged(updates, method="ties", space="full", parameters={"density": density, "reduce": reduce})
    close(ours, oracles.ties([u.dense() for u in updates], density, reduce), largest(updates) * 4)


@pytest.mark.parametrize("space", ["core", "core:basis=balanced", "knots"])
@given(stacks(kinds=GENERIC, low=6), densities)
def test_ties_in_coordinates_is_the_oracle(space: str, updates: list[LowRank], density: float) -> None:
    if space == "knots":
        u, s, vs = oracles.knots_space([x.dense() for x in updates])
        expected = u @ oracles.ties([s[:, None] * v for v in vs], density)
    else:
        pairs = [oracles.balanced(x.dense()) if "balanced" in space else (x.left, x.right) for x in updates]
        u, v, xs = oracles.core_space([a for a, _ in pairs], [b for _, b in pairs])
        expected = u @ oracles.ties(xs, density) @ v.T
    close(
        merged(updates, method="ties", space=space, parameters={"density": density}), expected, largest(updates), 1e-6
    )


def test_unscaled_knots_merges_v_and_scales_by_s_afterwards() -> None:
    updates = [lowrank(8, 9, r, seed=r) for r in (2, 3)]
    u, s, vs = oracles.knots_space([x.dense() for x in updates])
    for density in (0.2, 1.0):
        ours = merged(updates, method="ties", space="knots:scaled=false", parameters={"density": density})
        close(ours, u @ torch.diag(s) @ oracles.ties(vs, density))


def test_trim_keeps_the_largest_of_each_matrix() -> None:
    x = torch.tensor([[[3.0, -4.0], [1.0, 2.0]], [[0.1, 0.2], [-0.3, 0.0]]])
    kept = torch.tensor([[[3.0, -4.0], [0.0, 0.0]], [[0.0, 0.2], [-0.3, 0.0]]])
    assert torch.equal(trim(x, 0.5), kept)
    assert torch.equal(trim(x, 1.0), x)
    assert (trim(x, 0.01) != 0).sum() == 2  # at least one entry each


@given(st.integers(0, 99), densities)
def test_trim_keeps_the_share_that_density_says(seed: int, density: float) -> None:
    x = normal(seed)(7, 8)
    assert (trim(x, density) != 0).sum() == max(1, round(density * 56))


def test_the_elected_sign_is_that_of_the_sum() -> None:
    x = torch.tensor([[[5.0, 1.0, 1.0, 2.0]], [[-1.0, -3.0, 3.0, -2.0]], [[1.0, 0.0, 0.0, 0.0]]])
    assert torch.equal(elect(x, "mean"), torch.tensor([[3.0, -3.0, 2.0, 0.0]]))
    assert torch.equal(elect(x, "sum"), torch.tensor([[6.0, -3.0, 4.0, 0.0]]))


def test_everything_of_one_adapter_is_itself() -> None:
    a = lowrank(6, 5, 2)
    for space in SPACES:
        close(merged([a], method="ties", space=space, parameters={"density": 1}), a.dense())
        close(merged([a, a], method="ties", space=space, parameters={"density": 1}), a.dense())


@pytest.mark.parametrize("density", [0, -0.1, 1.1, "nan", "all"])
def test_a_density_is_a_share(density: object) -> None:
    with pytest.raises(ConfigError, match="density"):
        Recipe(method="ties", parameters={"density": density})


def test_a_column_of_next_to_nothing_takes_no_vote_from_the_others() -> None:
    """Balanced, a deficient update may have a direction that is all error; the others are none the less known."""
    for seed in (11, 39):
        deficient = make("deficient", 9, 7, 3, normal(seed), [])
        updates = [lowrank(9, 7, 3, seed=1), deficient, lowrank(9, 7, 2, seed=2)]
        found = merged(updates, method="ties", space="full", parameters={"density": 1}, steps=["balance"])
        close(found, oracles.ties([u.dense() for u in updates], 1.0))
