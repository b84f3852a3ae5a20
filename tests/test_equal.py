"""Adapters of one size: the factors, and the laws of the default merge that rest on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from coremerge.adapter import Adapter, Info
from coremerge.equal import GROWTH, common_size, equalized, factors, gram_norms, said
from coremerge.lowrank import LowRank
from coremerge.merging import merge
from coremerge.plan import make_plan
from coremerge.recipe import Recipe
from laws import close, dense, lowrank, named, normal, orthogonal


def test_norms_from_gram_matrices() -> None:
    update = lowrank(9, 7, 3)
    values = torch.linalg.svdvals(update.dense())
    close(gram_norms(update), torch.stack([values[0], values.norm()]).square())
    assert gram_norms(LowRank.zeros(4, 3)).tolist() == [0, 0]
    assert gram_norms(update * math.nan).tolist() == [math.inf, math.inf]
    assert gram_norms(update * 1e200).tolist() == [math.inf, math.inf]


class TestFactors:
    def test_they_bring_all_to_one_size(self) -> None:
        found = factors({"a": 2.0, "b": 1.0, "c": 0.7})
        assert {round(one.size * one.factor, 12) for one in found.values()} == {round(common_size([2.0, 1.0, 0.7]), 12)}
        assert all(one.share == 1 for one in found.values())

    def test_the_common_size_is_between_them_and_in_proportion(self) -> None:
        assert 1 < common_size([1.0, 4.0]) < 4
        assert common_size([10.0, 40.0]) == pytest.approx(10 * common_size([1.0, 4.0]))
        assert common_size([2.0, 2.0, 2.0]) == pytest.approx(2)

    def test_one_that_was_hardly_trained_grows_so_much_and_no_more(self) -> None:
        found = factors({"a": 1.0, "b": 1.0, "c": 1e-3})
        assert found["c"].factor == GROWTH
        assert found["c"].share == pytest.approx(GROWTH * 1e-3, rel=1e-2)
        assert found["a"].factor == pytest.approx(1, rel=1e-3)

    def test_one_that_fades_changes_nothing_more_and_more(self) -> None:
        without = factors({"a": 3.0, "b": 1.0})["a"].factor
        assert factors({"a": 3.0, "b": 1.0, "c": 1e-9})["a"].factor == pytest.approx(without, rel=1e-12)
        assert factors({"a": 3.0, "b": 1.0, "c": 0.0})["a"].factor == without

    def test_nothing_and_what_is_not_finite_are_left_alone(self) -> None:
        assert [one.factor for one in factors({"a": 0.0, "b": 0.0}).values()] == [1, 1]
        assert [one.factor for one in factors({"a": 1.0, "b": math.inf}).values()] == [1, 1]

    def test_with_many_adapters_the_extremes_are_said(self) -> None:
        assert said({str(i): float(i) for i in range(1, 20)}) == "made equal before merging: 1 × 1 to 19 × 19"


def adapters(count: int = 3) -> list[LowRank]:
    return [lowrank(12, 10, 2, seed=s) * 2.0**s for s in range(count)]


def merged(updates: list[LowRank], **recipe: object) -> torch.Tensor:
    return dense(merge(named(updates), Recipe(**recipe), threads=1).adapter)["layer"]


def test_a_merge_of_equal_norms_does_not_see_how_large_each_was() -> None:
    small = [u * (1 / u.norm()) for u in adapters()]
    recipe = {"method": "sum", "norms": "equal", "scale": 1.0}
    one, other = (
        merged([u * f for u, f in zip(small, sizes, strict=True)], **recipe) for sizes in ((1, 1, 1), (3, 1, 2))
    )
    close(one / one.norm(), other / other.norm())


def test_a_persons_weights_come_on_top() -> None:
    given = adapters()
    plain = merge(named(given), Recipe(method="sum", norms="equal", scale=1.0), threads=1)
    weights = [0.5, 1.0, 2.0]
    by_hand = [w * plain.report.norm_factors[key] for w, key in zip(weights, plain.plan.adapters, strict=True)]
    close(
        merged(given, method="sum", norms="equal", scale=1.0, weights=weights),
        merged(given, method="sum", scale=1.0, weights=by_hand),
    )


def test_one_adapter_and_own_norms_are_left_alone() -> None:
    assert merge(named(adapters(1)), Recipe(), threads=1).report.norm_factors == {}
    assert merge(named(adapters()), Recipe(norms="own"), threads=1).report.norm_factors == {}
    plan = make_plan(named(adapters()), Recipe(method="ties"))
    assert equalized(plan) is plan


def test_it_is_done_once() -> None:
    plan = equalized(make_plan(named(adapters()), Recipe()))
    assert equalized(plan) is plan


def test_an_adapter_of_weight_zero_is_not_there() -> None:
    given = adapters()
    without = merge(named(given[:2]), Recipe(), threads=1)
    beside = merge(named(given), Recipe(weights=[1.0, 1.0, 0.0]), threads=1)
    close(beside.adapter["layer"].dense(), without.adapter["layer"].dense())


def test_weights_of_components_come_on_top_as_well() -> None:
    given = named(adapters(2))
    fine = Recipe(scale=1.0, weights={"a0": {"layer": [0.5, 0.5]}})
    coarse = Recipe(scale=1.0, weights={"a0": {"layer": 0.5}})
    close(*(merge(given, recipe, threads=1).adapter["layer"].dense() for recipe in (fine, coarse)))


def test_one_of_weight_zero_says_nothing_of_the_model_either() -> None:
    given = {
        key: Adapter.from_updates({"layer": update}, info=Info(task_type=kind))
        for key, update, kind in zip(
            "xyz", adapters(), ("FEATURE_EXTRACTION", "FEATURE_EXTRACTION", "CAUSAL_LM"), strict=True
        )
    }
    beside = merge(given, Recipe(weights=[1, 1, 0]), threads=1).adapter["layer"].dense()
    close(beside, merge({key: given[key] for key in "xy"}, Recipe(), threads=1).adapter["layer"].dense())


def test_an_update_that_fades_in_one_module_goes_without_a_jump() -> None:
    one, other = ({name: lowrank(9, 7, 2, seed=seed + i) for i, name in enumerate("xy")} for seed in (0, 5))
    sizes = {}
    for size in (1e-3, 1e-6, 1.01e-8, 1e-9, 0.0):
        pair = [Adapter.from_updates({"x": one["x"], "y": size * one["y"]}), Adapter.from_updates(other)]
        sizes[size] = merge(pair, Recipe(), threads=1).report.scale
    assert all(scale == pytest.approx(sizes[0.0], rel=1e-3) for scale in sizes.values())


def test_modules_that_one_adapter_lacks_count_as_nothing() -> None:
    one = Adapter.from_updates({"x": lowrank(9, 7, 2), "y": lowrank(9, 7, 2, seed=1)}, name="one")
    other = Adapter.from_updates({"x": lowrank(9, 7, 2, seed=2)}, name="other")
    report = merge([one, other], Recipe(), threads=1).report
    assert report.norm_factors["one"] < 1 < report.norm_factors["other"]


def test_what_is_held_back_is_said() -> None:
    given = [*adapters(2), 1e-4 * lowrank(12, 10, 2, seed=9)]
    report = merge(named(given), Recipe(), threads=1).report
    assert any("a2 is much smaller than the others" in warning for warning in report.warnings)
    assert not merge(named(given), Recipe(norms="own"), threads=1).report.warnings


def test_values_that_are_not_finite_are_refused_as_ever() -> None:
    with pytest.raises(Exception, match="NaN or infinite"):
        merged([*adapters(), lowrank(12, 10, 2) * math.nan])


@pytest.fixture(params=[0.0, 0.97], ids=["encoders", "decoders"])
def default(request: pytest.FixtureRequest) -> Callable[[Sequence[LowRank]], torch.Tensor]:
    """The merge that is made where nothing is said, as it is settled for either kind of model."""
    return lambda updates: merged(list(updates), parameters={"even": request.param})


Default = Callable[[Sequence[LowRank]], torch.Tensor]


class TestDefault:
    """The laws of the merge that is made where nothing is said."""

    def test_one_adapter_is_itself(self, default: Default) -> None:
        close(default(adapters(1)), adapters(1)[0].dense(), tol=1e-12)

    @pytest.mark.parametrize("count", [2, 3, 7])
    def test_copies_are_the_adapter(self, default: Default, count: int) -> None:
        update = lowrank(12, 10, 3)
        close(default([update] * count), update.dense(), tol=1e-12)

    @pytest.mark.parametrize("weights", [[1.0, 0.1], [1.0, 0.01], [0.3, 2.0]])
    def test_copies_of_any_weights_are_a_multiple_of_it(self, default: Default, weights: list[float]) -> None:
        update = lowrank(12, 10, 3)
        found = merged([update, update], weights=weights)
        close(found / found.norm(), update.dense() / update.norm())
        found = default([update, 0.05 * update])
        close(found / found.norm(), update.dense() / update.norm())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
    def test_rounded_copies_too(self, default: Default, dtype: torch.dtype) -> None:
        update = lowrank(12, 10, 3)
        rounded = LowRank(update.left.to(dtype).double(), update.right.to(dtype).double())
        apart = (rounded - update).norm()
        assert (default([update, rounded]) - update.dense()).norm() < 1.5 * apart

    def test_near_copies_are_near_their_mean(self, default: Default) -> None:
        update, draw = lowrank(12, 10, 3), normal(5)
        other = LowRank(draw(12, 3), draw(3, 10))
        for size in (1e-1, 1e-2, 1e-3, 1e-4):
            near = update + size * other
            mean = (update.dense() + near.dense()) / 2
            assert (default([update, near]) - mean).norm() < 5 * size * update.norm()

    def test_disjoint_spans_keep_all_directions_where_they_were(self, default: Default) -> None:
        u, v = orthogonal(12), orthogonal(12, seed=1)
        strengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        given = [LowRank(u[:, i : i + 3] * strengths, v[i : i + 3]) for i in (0, 3, 6)]
        inner = u[:, :9].mT @ default(given) @ v[:9].mT
        close(inner, torch.diag(inner.diagonal()))
        found = inner.diagonal().reshape(3, 3)
        close(found, found[:1].expand(3, 3))
        assert (found[:, :-1] > found[:, 1:]).all()

    def test_disjoint_adapters_of_any_sizes_come_out_alike(self, default: Default) -> None:
        u, v = orthogonal(12), orthogonal(12, seed=1)
        given = [LowRank(u[:, i : i + 3], v[i : i + 3]) * 10.0 ** (i / 6) for i in (0, 3, 6)]
        values = torch.linalg.svdvals(default(given))[:9]
        assert values.max() < 1.01 * values.min()

    @pytest.mark.parametrize("factor", [1e-85, 1e-6, 1e3, 1e77])
    def test_it_is_in_proportion(self, default: Default, factor: float) -> None:
        close(default([factor * u for u in adapters()]), factor * default(adapters()))

    def test_the_order_makes_no_difference(self, default: Default) -> None:
        close(default(adapters()[::-1]), default(adapters()))

    def test_a_zero_adapter_changes_nothing(self, default: Default) -> None:
        close(default([*adapters(), LowRank.zeros(12, 10)]), default(adapters()))
        close(default([*adapters(), 0.0 * lowrank(12, 10, 2, seed=9)]), default(adapters()))

    def test_a_small_change_is_a_small_change(self, default: Default) -> None:
        given, draw = adapters(), normal(6)
        plain = default(given)
        for size in (1e-2, 1e-3, 1e-4, 1e-6):
            moved = [LowRank(u.left + size * draw(*u.left.shape), u.right + size * draw(*u.right.shape)) for u in given]
            assert (default(moved) - plain).norm() < 40 * size * plain.norm()

    def test_one_that_fades_goes_without_a_jump(self, default: Default) -> None:
        given, other = adapters(), lowrank(12, 10, 2, seed=9)
        plain = default(given)
        for size in (1e-3, 1e-4, 1e-5, 1e-6, 1e-9):
            assert (default([*given, size * other]) - plain).norm() < 100 * size * plain.norm() + 1e-6

    def test_no_direction_jumps_on_its_way_to_nothing(self, default: Default) -> None:
        u, v = orthogonal(12), orthogonal(10, seed=1)
        mixed = lowrank(12, 10, 3)
        found = [default([LowRank(u[:, :2] * torch.tensor([1.0, s]).double(), v[:2]), mixed]) for s in WEAK]
        for one, other, s in zip(found, found[1:], WEAK, strict=False):
            assert (one - other).norm() < 40 * s * one.norm() + 1e-6


WEAK = [10.0**-i for i in range(1, 12)]
