import pytest
import torch

from coremerge.errors import ConfigError
from coremerge.methods.della import probabilities
from laws import close, lowrank, merged, normal


def test_probabilities_grow_with_a_rows_magnitudes_and_have_the_density_as_mean() -> None:
    x = normal(1)(5, 9)
    found = probabilities(x, 0.5, 0.2)
    close(found.mean(-1), torch.full((5,), 0.5, dtype=torch.float64))
    for row, kept in zip(x, found, strict=True):
        order = row.abs().argsort()
        close(kept[order], torch.linspace(0.3, 0.7, 9, dtype=torch.float64))


def test_on_average_it_is_the_sum() -> None:
    updates = [lowrank(9, 7, 3, seed=s) for s in (1, 2)]
    settings = {"method": "della", "space": "full", "parameters": {"elect": False, "epsilon": 0.3}}
    found = sum(merged(updates, seed=seed, **settings) for seed in range(400)) / 400
    exact = sum(u.dense() for u in updates)
    assert (found - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(merged(updates, seed=0, **settings), merged(updates, seed=1, **settings))
    assert torch.equal(merged(updates, seed=0, **settings), merged(updates, seed=0, **settings))


@pytest.mark.parametrize("given", [{"density": 0.1, "epsilon": 0.1}, {"density": 0.95}, {"density": 1}])
def test_what_is_no_probability_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="density ± epsilon are probabilities"):
        merged([lowrank(4, 3, 2)], method="della", parameters=given)


def test_a_row_of_one_has_the_density() -> None:
    assert torch.equal(probabilities(torch.ones(3, 1), 0.5, 0.1), torch.full((3, 1), 0.5))
