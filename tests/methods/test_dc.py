import pytest
import torch
from hypothesis import given

import oracles
from laws import LowRank, close, largest, lowrank, merged, orthogonal, stacks


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@pytest.mark.parametrize("smoothing", ["average", "linear", "own"])
@given(updates=stacks(kinds=("plain", "same right", "zero", "empty"), tasks=(2, 4)))
def test_it_is_the_formula_in_every_space(space: str, smoothing: str, updates: list[LowRank]) -> None:
    if sum(u.dense().norm() > 0 for u in updates) < 2:
        return
    parameters = {"smoothing": smoothing, "rho": 3.0, "density": 0.2}
    expected = oracles.dc([u.dense() for u in updates], **parameters)
    close(merged(updates, method="dc", space=space, parameters=parameters), expected, largest(updates), tol=1e-6)


def test_eight_adapters_of_rank_16_as_published() -> None:
    """0.001 of 128 × 128 entries is 16: one for each direction."""
    updates = [lowrank(150, 140, 16, seed=s) for s in range(8)]
    found = merged(updates, method="dc")
    close(found, oracles.dc([u.dense() for u in updates]), tol=1e-7)
    close(found, merged(updates, method="dc", parameters={"density": 1e-9}))


def test_disjoint_adapters_keep_their_directions_evened() -> None:
    u, v = orthogonal(9), orthogonal(8, seed=1)
    sizes = torch.tensor([3.0, 1.0], dtype=torch.float64)
    apart = [LowRank(u[:, i : i + 2] * sizes, v[i : i + 2]) for i in (0, 2, 4)]
    close(merged(apart, method="dc"), 2 * u[:, :6] @ v[:6])
    close(merged(apart, method="dc", parameters={"smoothing": "own"}), sum(x.dense() for x in apart))
    straight = sum(
        LowRank(u[:, i : i + 2] * (4 / 3) * torch.tensor([2.0, 1.0]), v[i : i + 2]).dense() for i in (0, 2, 4)
    )
    close(merged(apart, method="dc", parameters={"smoothing": "linear", "rho": 2.0}), straight)


def test_one_adapter_comes_back_unless_it_is_evened_by_name() -> None:
    update = lowrank(9, 7, 3)
    for given_ in ([update], [update, update], [update, LowRank.zeros(9, 7)]):
        found = merged(given_, method="dc", scale="auto")
        close(found, update.dense())
    flat = merged([update], method="dc", parameters={"smoothing": "average"})
    close(flat, oracles.isotropize(update.dense()))


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@pytest.mark.parametrize("smoothing", ["average", "linear", "own"])
def test_any_basis_of_directions_that_are_equally_strong_gives_one_result(space: str, smoothing: str) -> None:
    """As those of adapters that were flattened before: an SVD may give any."""
    u, v = [orthogonal(12, seed=s) for s in range(3)], [orthogonal(10, seed=s + 9) for s in range(3)]
    strengths = [torch.tensor(s, dtype=torch.float64) for s in ([1.0, 1.0, 1.0], [2.0, 2.0, 0.5, 0.5], [1.5, 1.5])]
    updates = [LowRank(a[:, : len(s)] * s, b[: len(s)]) for a, b, s in zip(u, v, strengths, strict=True)]
    parameters = {"smoothing": smoothing, "density": 0.1}
    found = merged(updates, method="dc", space=space, parameters=parameters)
    p, q = orthogonal(12, seed=20), orthogonal(10, seed=21)
    for turned in (
        [LowRank(p @ x.left, x.right @ q) for x in updates],
        [LowRank(p @ x.dense() @ q, torch.eye(10).double()) for x in updates],
    ):
        close(p.T @ merged(turned, method="dc", space=space, parameters=parameters) @ q.T, found, tol=1e-7)


@pytest.mark.parametrize("size", [1e-80, 1e80])
def test_sizes_beyond_squares_do_not_matter(size: float) -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    close(merged([size * u for u in updates], method="dc") / size, merged(updates, method="dc"))


def test_nothing_stays_nothing_and_adds_nothing() -> None:
    for update in (0.0 * lowrank(4, 3, 2), LowRank.zeros(4, 3)):
        assert merged([update, update], method="dc").abs().max() == 0
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    close(merged([*updates, LowRank.zeros(9, 7)], method="dc"), merged(updates, method="dc"))
