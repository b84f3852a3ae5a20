import pytest
import torch

import oracles
from coremerge.adapter import Adapter
from coremerge.methods import METHODS, Site
from laws import LowRank, close, lowrank, merged, named, run

UPDATES = [lowrank(8, 9, r, seed=r) for r in (2, 3, 1)]


def masks(site: Site, shape: tuple[int, int], rate: float) -> list[torch.Tensor]:
    like = torch.zeros(shape).double()
    return [(site.uniform(t, like) >= rate).double() for t in range(len(UPDATES))]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_dare_is_the_oracle_with_the_same_masks(rate: float) -> None:
    site = Site(3, ("layer",), ("a0", "a1", "a2"))
    xs = oracles.dropped([u.dense() for u in UPDATES], masks(site, (8, 9), rate), rate)
    settings = {"space": "full", "seed": 3}
    close(merged(UPDATES, method="dare", parameters={"drop_rate": rate}, **settings), oracles.sum_(xs))
    both = {"drop_rate": rate, "density": 0.3}
    close(merged(UPDATES, method="dare_ties", parameters=both, **settings), oracles.ties(xs, 0.3))


def test_dare_in_core_masks_the_entries_of_the_core() -> None:
    u, v, cores = oracles.core_space([x.left for x in UPDATES], [x.right for x in UPDATES])
    site = Site(0, ("layer",), ("a0", "a1", "a2"))
    xs = oracles.dropped(cores, masks(site, (6, 6), 0.5), 0.5)
    close(merged(UPDATES, method="dare"), u @ oracles.sum_(xs) @ v.T)


def test_dropping_nothing_is_the_sum() -> None:
    for space in ("core", "knots", "full"):
        none = {"drop_rate": 0}
        close(merged(UPDATES, method="dare", space=space, parameters=none), merged(UPDATES, method="sum"))
        ties = merged(UPDATES, method="ties", space=space)
        close(merged(UPDATES, method="dare_ties", space=space, parameters=none), ties)


def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays() -> None:
    ones = LowRank(torch.ones(200, 1).double(), torch.ones(1, 200).double())
    x = METHODS.build("dare:drop_rate=0.8")([ones], Site())
    assert (x == 0).double().mean().item() == pytest.approx(0.8, abs=0.01)  # five times its spread over 40,000 draws
    assert x.mean().item() == pytest.approx(1, abs=0.05)  # likewise: a value is 0 or 5
    assert x.max().item() == pytest.approx(5)


def test_a_mask_depends_on_seed_module_and_adapter_only() -> None:
    def draw(seed: int = 0, module: str = "m", task: str = "a", others: tuple[str, ...] = ()) -> torch.Tensor:
        return Site(seed, (module,), (*others, task)).uniform(len(others), torch.zeros(4, 5).double())

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(), draw(others=("b", "c")))
    for other in (draw(seed=1), draw(module="n"), draw(task="b"), draw(seed=-1)):
        assert not torch.equal(draw(), other)
    batch = Site(0, ("l", "m"), ("a",)).uniform(0, torch.zeros(2, 4, 5).double())
    assert torch.equal(batch[1], draw())


def test_masks_follow_names_not_places() -> None:
    adapters = named(UPDATES)
    forward = run(adapters, method="dare", space="full")
    backward = run(dict(reversed(adapters.items())), method="dare", space="full")
    close(forward.adapter["layer"].dense(), backward.adapter["layer"].dense())
    renamed = dict(zip("xyz", adapters.values(), strict=True))
    other = run(renamed, method="dare", space="full").adapter["layer"].dense()
    assert not torch.allclose(other, forward.adapter["layer"].dense())


def test_another_seed_is_another_merge_and_the_same_seed_the_same_bytes() -> None:
    one, same, other = (merged(UPDATES, method="dare_ties", seed=s) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_modules_draw_different_masks() -> None:
    adapter = Adapter.from_updates({"m": UPDATES[0], "n": UPDATES[0]})
    result = run([adapter], method="dare", parameters={"drop_rate": 0.5}).adapter
    assert not torch.allclose(result["m"].dense(), result["n"].dense())
