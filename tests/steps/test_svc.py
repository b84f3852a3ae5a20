import pytest
import torch
from hypothesis import given

import oracles
from coremerge import Adapter, Recipe, merge
from coremerge.errors import ConfigError
from laws import LowRank, close, largest, lowrank, merged, orthogonal, stacks

SVC = {"method": "sum", "steps": ["svc"]}


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@pytest.mark.parametrize("alpha", [None, 1.0])
@given(updates=stacks(kinds=("plain", "same right", "zero", "empty")))
def test_it_is_the_formula_in_every_space(space: str, alpha: float | None, updates: list[LowRank]) -> None:
    deltas = [u.dense() for u in updates]
    expected = oracles.svc(oracles.sum_(deltas), deltas, alpha)
    found = merged(updates, method="sum", space=space, steps=[{"svc": {"alpha": alpha}}])
    close(found, expected, largest(updates) * 4, tol=1e-6)


def test_one_adapter_and_disjoint_adapters_come_back() -> None:
    update = lowrank(9, 7, 3)
    close(merged([update], **SVC), update.dense())
    close(merged([update, LowRank.zeros(9, 7), 0.0 * update], **SVC), update.dense())
    u, v = orthogonal(9), orthogonal(7, seed=1)
    apart = [LowRank((i + 1) * u[:, i : i + 2], lowrank(2, 2, 2, seed=i).dense() @ v[i : i + 2]) for i in (0, 2, 4)]
    close(merged(apart, **SVC), sum(x.dense() for x in apart))


@pytest.mark.parametrize("count", [2, 5])
def test_what_all_share_is_counted_once_whatever_its_weight(count: int) -> None:
    update = lowrank(9, 7, 3)
    close(merged([update] * count, **SVC), update.dense())
    close(merged([update] * count, weights=[0.5] * count, **SVC), 0.5 * update.dense())


def test_what_some_share_is_as_strong_as_what_one_has() -> None:
    u, v = orthogonal(9), orthogonal(7, seed=1)
    shared, own = LowRank(u[:, :1], v[:1]), LowRank(0.9 * u[:, 1:2], v[1:2])
    found = merged([shared, shared, shared, own], **SVC)
    close(found, (shared + own).dense())


def test_directions_stay_and_with_alpha_1_none_grows() -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    plain, weaker = (merged(updates, method="sum", steps=s) for s in ([], ["svc:alpha=1"]))
    u, s, vh = oracles.thin(plain)
    inner = u.T @ weaker @ vh.T
    close(inner, inner.diagonal().diag())
    assert (inner.diagonal() <= s * (1 + 1e-9)).all()
    assert (inner.diagonal() < 0.9 * s).any()


def test_the_size_of_what_the_method_gave_does_not_matter_above_alpha() -> None:
    updates = [lowrank(9, 7, 2, seed=s) + 3.0 * lowrank(9, 7, 2, seed=9) for s in range(3)]
    one, other = (merged(updates, method=method, steps=["svc:alpha=1e-12"]) for method in ("sum", "mean"))
    close(one, other)


@pytest.mark.parametrize("size", [1e-80, 1e80, 1e120])
def test_sizes_beyond_squares_do_not_matter(size: float) -> None:
    updates = [lowrank(9, 7, 2, seed=s) for s in range(3)]
    close(
        merged([size * u for u in updates], method="tsv", steps=["svc"]) / size,
        merged(updates, method="tsv", steps=["svc"]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rounding_of_stored_numbers_has_no_say(dtype: torch.dtype) -> None:
    """Adapters that are disjoint but for rounding: none of them has errors that hold down, or lift, a direction."""
    u, v = orthogonal(48), orthogonal(40, seed=1)
    sizes = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    updates = [LowRank((1 + i / 8) * sizes * u[:, 4 * i : 4 * i + 4], v[4 * i : 4 * i + 4]) for i in range(3)]
    given = [Adapter.from_updates({"layer": LowRank(x.left.to(dtype), x.right.to(dtype))}) for x in updates]
    plain, found = (
        merge(given, Recipe(method="sum", steps=steps, scale=1), threads=1).adapter["layer"].dense()
        for steps in ([], ["svc"])
    )
    assert (found - plain).norm() < 20 * torch.finfo(dtype).eps * plain.norm()


def test_one_that_fades_has_less_and_less_of_a_say() -> None:
    """As a small change of an adapter is a small change of the merge: the more so as the ratio of what fades grows."""
    updates, other = [lowrank(9, 7, 2, seed=s) for s in range(2)], lowrank(9, 7, 2, seed=5)
    without, before = merged(updates, **SVC), torch.inf
    for size in (1e-3, 1e-4, 1e-5, 1e-6):
        moved = float((merged([*updates, size * other], **SVC) - without).norm())
        assert moved < before / 3
        before = moved
    assert before < 1e-2


def test_nothing_stays_nothing() -> None:
    for update in (0.0 * lowrank(4, 3, 2), LowRank.zeros(4, 3)):
        assert merged([update, update], **SVC).abs().max() == 0


def test_a_ratio_that_is_none_is_refused() -> None:
    for alpha in ("0", "1.5", "nan"):
        with pytest.raises(ConfigError, match="not a value that step 'svc' takes"):
            merged([lowrank(4, 3, 2)], method="sum", steps=[f"svc:alpha={alpha}"])
