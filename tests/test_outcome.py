"""The scale that goes by the base: what one task meets of the others."""

from __future__ import annotations

import pytest
import torch

from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult, merge
from coremerge.outcome import BEARABLE
from coremerge.recipe import Recipe
from laws import close, lowrank, named, orthogonal


def run(updates: list[LowRank], norm: float, **recipe: object) -> MergeResult:
    return merge(named(updates), Recipe(scale="base", **recipe), base_norms={"layer": norm**2}, threads=1)


def updates(count: int = 3) -> list[LowRank]:
    return [lowrank(12, 10, 2, seed=s) for s in range(count)]


def disturbance(result: MergeResult, given: list[LowRank]) -> float:
    """Of the formula, dense: the root of the mean over tasks."""
    whole = result.adapter["layer"].dense()
    own = [
        factor * u.dense() for factor, u in zip(result.report.norm_factors.values() or [1.0] * 9, given, strict=False)
    ]
    met = [whole - u * float((whole * u).sum() / u.square().sum()) for u in own]
    says = torch.stack([u.square().sum() for u in own])
    says = says / (says + 0.01 * says.max())
    return float(((says * torch.stack([x.square().sum() for x in met])).sum() / says.sum()).sqrt())


@pytest.mark.parametrize(
    "recipe", [{}, {"method": "sum"}, {"method": "ties"}, {"method": "tsv", "steps": ["isotropize"]}]
)
def test_a_base_that_bears_less_gets_less(recipe: dict) -> None:
    given = updates()
    auto = merge(named(given), Recipe(**recipe), threads=1).report.scale
    assert run(given, 1e6, **recipe).report.scale == auto
    small = run(given, 1.0, **recipe)
    assert small.report.scale < auto
    assert disturbance(small, given) == pytest.approx(BEARABLE)
    assert run(given, 2.0, **recipe).report.scale == pytest.approx(2 * small.report.scale)


def test_orthogonal_updates_meet_all_but_their_own() -> None:
    u, v = orthogonal(12), orthogonal(10, seed=1)
    given = [LowRank(u[:, i : i + 2], v[i : i + 2]) for i in (0, 2, 4)]
    scale = run(given, 1.0, method="sum").report.scale
    assert scale == pytest.approx(BEARABLE / (2 * 2) ** 0.5)  # two others, each of squared norm 2


@pytest.mark.parametrize("count", [1, 4])
def test_one_adapter_and_copies_meet_nothing(count: int) -> None:
    update = lowrank(12, 10, 2)
    close(run([update] * count, 1e-3).adapter["layer"].dense(), update.dense())


def test_an_adapter_of_weight_zero_meets_and_disturbs_nothing() -> None:
    given = updates(2)
    with_it = run([*given, lowrank(12, 10, 2, seed=9)], 1.0, weights=[1.0, 1.0, 0.0])
    assert with_it.report.scale == pytest.approx(run(given, 1.0).report.scale)


def test_without_norms_of_all_modules_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scale = .base.*norms of the base model's weights are not known"):
        merge(named(updates()), Recipe(scale="base"))
    with pytest.raises(ConfigError, match="not known"):
        merge(named(updates()), Recipe(scale="base"), base_norms={"other": 1.0})


def test_a_weight_of_zeros_bears_nothing_to_go_by() -> None:
    given = updates()
    assert run(given, 0.0).report.scale == merge(named(given), Recipe(), threads=1).report.scale


def test_one_that_fades_goes_without_a_jump() -> None:
    given = updates(2)
    plain = run(given, 1.0).report.scale
    for size in (1e-3, 1e-5, 1e-9):
        beside = run([*given, size * lowrank(12, 10, 2, seed=9)], 1.0).report.scale
        assert beside == pytest.approx(plain, rel=100 * size + 1e-7)
