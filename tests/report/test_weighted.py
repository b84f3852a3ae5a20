"""Weights by adapter and by block."""

from __future__ import annotations

from typing import Any

import pytest

from coremerge.report.gather import places_of
from coremerge.report.part import Blocks
from coremerge.report.weighted import plain_weights, weighted

NAMES = ["layers.0.q", "layers.1.q"]
INPUTS = [{"name": "a"}, {"name": "b"}]


def record(weights: Any) -> dict[str, Any]:
    return {"recipe": {"weights": weights}, "inputs": INPUTS}


@pytest.mark.parametrize(
    ("weights", "plain"),
    [
        (None, {}),
        ([0.5, 2.0], {"a": 0.5, "b": 2.0}),
        ({"a": 0.5}, {"a": 0.5}),
        ({"a": {"layers.0.q": 1.0}, "b": 0.5}, {"b": 0.5}),
    ],
)
def test_plain_weights_are_one_number_an_adapter(weights: Any, plain: dict[str, float]) -> None:
    assert plain_weights(record(weights)) == plain


def test_weights_by_module_are_a_map_and_those_of_components_a_mean() -> None:
    table = {"a": {"layers.0.q": [1.0, 2.0], "layers.1.q": -0.25}, "b": 0.5}
    (part,) = weighted(record(table), Blocks(places_of(NAMES)), None)
    ((_, picture),) = part.figures
    for said in ("a, 0: 1.50", "a, 1: -0.25", "b, 0: 0.50", "b, 1: 0.50"):
        assert said in picture
    assert part.table is None
    assert list(weighted(record(None), Blocks(places_of(NAMES)), None)) == []
