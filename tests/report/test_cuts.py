"""Whatever a recipe cuts by itself is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coremerge import Adapter, LowRank, Recipe, merge
from coremerge.methods import METHODS
from coremerge.report.cuts import LISTED, cut_of_fit, cut_to_rank, cuts_of

CUTTING = {"rank", "density", "drop_rate"}


@pytest.mark.parametrize(
    ("method", "parameters", "steps", "words"),
    [
        ("tsv", {"rank": 4}, [], "at most 4 directions of each adapter"),
        ("tsv", {"rank": "1"}, ["isotropize"], "at most 1 direction of each adapter"),
        ("tsv", {"rank": "4.0"}, [], "tsv (rank=4) keeps at most 4 directions of each adapter"),
        ("cart", {}, [], "at most 8 directions of each adapter's deviation from their mean"),
        ("ties", {}, [], "a share of 0.2"),
        ("dare", {"drop_rate": 0.3}, [], "drops entries of each adapter's core with probability 0.3"),
        ("sum", {}, ["truncate:rank=3"], "at most 3 directions of the merged update"),
        ("sum", {}, [{"truncate": {"rank": 3}}], "at most 3 directions of the merged update"),
    ],
)
def test_what_cuts_says_so(method: str, parameters: dict[str, Any], steps: list[Any], words: str) -> None:
    (said,) = cuts_of(method, parameters, steps)
    assert words in said


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsv", {}),
        ("tsv", {"rank": None}),
        ("tsv", {"rank": "None"}),
        ("tsv", {"rank": "null"}),
        ("sum", {}),
        ("dare", {"drop_rate": 0}),
        ("?", {}),
    ],
)
def test_what_cuts_nothing_is_silent(method: str, parameters: dict[str, Any]) -> None:
    assert list(cuts_of(method, parameters, ["isotropize"])) == []


def test_no_method_with_a_parameter_that_cuts_is_silent() -> None:
    for name in METHODS:
        if cutting := CUTTING & METHODS[name].parameters.keys():
            assert list(cuts_of(name, {key: 2 if key == "rank" else 0.5 for key in cutting})), name


def test_all_that_is_kept_is_no_cut_and_almost_all_is_one() -> None:
    assert list(cuts_of("tsv", {"rank": 4}, kept={"a": 1.0, "b": 1 - 1e-12})) == []
    (said,) = cuts_of("tsv", {"rank": 4}, kept={"a": 1.0, "b": 0.9999})
    assert said.endswith("of its energy 100 % (a), 99.9 % (b)")


def test_of_many_adapters_the_least_and_the_largest_share_are_said() -> None:
    kept = {f"a{i}": 0.5 + i / 100 for i in range(LISTED + 1)}
    assert next(cuts_of("tsv", {"rank": 4}, kept=kept)).endswith("50 % (a0) to 58 % (a8)")


def test_a_cut_to_a_rank_is_said_once() -> None:
    assert list(cut_to_rank(8, 0.03, [])) == ["the cut to rank 8 loses 3.0 % of the merged update's energy"]
    assert list(cut_to_rank(8, 0.3, ["the cut to rank 8 loses 30% of it"])) == []
    assert len(list(cut_of_fit(0.03, []))) == 1
    assert list(cut_of_fit(0.3, ["the cut to rank loses 30.0%"])) == list(cut_of_fit(0.0, [])) == []
    assert list(cut_to_rank(8, 0.0, [])) == list(cut_to_rank(None, None, [])) == []


def adapter(seed: int, ranks: dict[str, int]) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Adapter.from_updates({name: LowRank(factor(9, r), factor(r, 7)) for name, r in ranks.items()})


def share(held: Adapter, rank: int) -> float:
    squares = [torch.linalg.svdvals(update.dense()).square() for update in held.values()]
    return float(sum(x[:rank].sum() for x in squares) / sum(x.sum() for x in squares))


@pytest.mark.parametrize("space", ["core", "full", "knots"])
def test_a_merge_says_what_its_method_keeps_of_each_adapter(space: str) -> None:
    held = {"a": adapter(1, {"x": 4, "y": 4, "z": 4}), "b": adapter(2, {"x": 3, "y": 3}), "c": adapter(3, {"x": 2})}
    found = merge(held, Recipe(method="tsv", parameters={"rank": 2}, space=space, weights=[1.0, 3.0, 1.0])).report
    assert found.input_kept == pytest.approx({name: share(one, 2) for name, one in held.items()})
    assert found.to_dict()["input_kept"] == found.input_kept
    assert set(found.modules["y"].input_kept) == {"a", "b"}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="tsv"),
        Recipe(method="sum"),
        Recipe(method="tsv", parameters={"rank": 2}, space="knots:scaled=false"),
    ],
)
def test_nothing_is_said_of_what_is_not_known_or_not_cut(recipe: Recipe) -> None:
    held = {"a": adapter(1, {"x": 4}), "b": adapter(2, {"x": 3})}
    assert merge(held, recipe).report.input_kept == {}
