"""What the tables of merges compute: grids, controls, scales, geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.accuracy import geometry, scale, tables
from benchmarks.accuracy.work import Bench, Merged

from coremerge import Adapter, LowRank, Recipe, merge
from tolerances import DIGITS, DOUBLE


def adapter(seed: int, rank: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def update(m: int, n: int) -> LowRank:
        return LowRank(
            torch.randn(m, rank, generator=generator).double(), torch.randn(rank, n, generator=generator).double()
        )

    return Adapter.from_updates({"a": update(8, 6), "b": update(7, 9)}, name=str(seed))


@pytest.fixture
def bench() -> Bench:
    taskset: Any = None
    return Bench(taskset, {f"t{seed}": adapter(seed) for seed in range(3)}, {"validation": 1, "test": 1})


def test_every_named_merge_is_in_the_grid() -> None:
    labels = {merge.label for merge in tables.grid().merges}
    assert len(labels) == len(tables.grid().merges)
    for listed in (tables.FEW, scale.LABELS, geometry.CUT, geometry.NEAR):
        assert set(listed) <= labels


def test_untuned_takes_first_values() -> None:
    (ties,) = tables.grid(["full ties"]).merges
    recipe = tables.untuned(ties)
    assert (recipe.space, recipe.parameters, recipe.scale) == ("full", {"density": 0.2}, "auto")


def test_random_adapters_have_the_spectra_and_nothing_else(bench: Bench) -> None:
    made = tables.random_like(bench, seed=1)
    for name, own in bench.adapters.items():
        for module in own:
            torch.testing.assert_close(made[name][module].svd.values, own[module].svd.values)
            assert abs(float(made[name][module].inner(own[module]))) < 0.9 * float(own[module].norm()) ** 2


def curve(best: float, size: float = 1.0) -> scale.Curve:
    """A score that is highest at ``best`` times the automatic scale."""
    validation = {factor: -abs(torch.tensor(factor / best).log().item()) for factor in scale.FACTORS}
    sizes = {"size": size, scale.SCALE: 1.0, scale.SPECTRAL: size, scale.FROBENIUS: size}
    return scale.Curve(validation, sizes)


def test_scores_between_scales_are_interpolated() -> None:
    one = curve(scale.FACTORS[4])
    assert one.best == scale.FACTORS[4]
    middle = (scale.FACTORS[4] * scale.FACTORS[5]) ** 0.5
    assert one.at(middle) == pytest.approx((one.validation[scale.FACTORS[4]] + one.validation[scale.FACTORS[5]]) / 2)
    assert one.at(0.0) == one.validation[scale.FACTORS[0]]
    assert one.at(1e9) == one.validation[scale.FACTORS[-1]]


def test_a_rule_that_holds_loses_nothing_on_the_other_half() -> None:
    """All merges are best at size 2: the one that is half as large at twice the factor."""
    large, small = curve(1.0, size=2.0), curve(2.0, size=1.0)
    halves = [({"x": large, "y": small}, {"x": small, "y": large})]
    found = {name: (constants, losses) for name, constants, losses in scale.transfers(halves)}
    constants, losses = found["size"]
    assert constants == pytest.approx([2.0, 2.0])
    assert losses == pytest.approx([0.0] * 4, abs=DOUBLE)
    assert max(found[f"auto: {scale.MIXED}, 1"][1]) == pytest.approx(torch.tensor(2.0).log().item())


def test_sizes_grow_with_the_scale(bench: Bench) -> None:
    merged = bench.merged(Recipe(method="sum"))
    found = scale.sizes(bench, merged)
    assert found[scale.SPECTRAL] * found[scale.FROBENIUS] == pytest.approx(1)
    result = merge(bench.adapters, Recipe(method="sum", scale=2 * merged.result.report.scale))
    twice = scale.sizes(bench, Merged(result, dict(result.adapter)))
    assert twice == pytest.approx({name: 2 * size for name, size in found.items()})


def test_alignment_is_the_same_in_full_and_core(bench: Bench) -> None:
    one, other = list(bench.adapters.values())[:2]
    assert geometry.dense_ratio(one, other) == pytest.approx(geometry.core_ratio(one, other), abs=DIGITS)


def test_components_are_discarded_from_the_smallest(bench: Bench) -> None:
    update = adapter(0, rank=4)["a"]
    kept = geometry.without({"a": update}, 0.5)["a"]
    torch.testing.assert_close(kept.svd.values[:2], update.svd.values[:2])
    assert kept.rank == 2
    assert geometry.without({"a": update}, 1.0)["a"].rank == 0
