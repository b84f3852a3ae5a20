"""Adapters as people name them."""

from __future__ import annotations

import pytest

from coremerge import Recipe
from coremerge.errors import ConfigError
from coremerge.inputs import by_label, read_adapters, with_labels
from tiny import make_adapter


@pytest.fixture
def sources(tmp_path):
    return [make_adapter(tmp_path / name, rank, seed=rank) for name, rank in (("A", 4), ("B", 6))]


def test_the_initial_adapter_of_one_of_two_with_one_name(sources, tmp_path):
    twin = make_adapter(tmp_path / "x" / "A", seed=5, init_lora_weights="pissa")
    start = make_adapter(tmp_path / "x" / "A0", seed=6, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="more than one adapter of that name"):
        read_adapters([sources[0], twin], initial={"A": start})
    adapters = read_adapters([sources[0], twin], initial={str(twin): start})
    assert list(adapters) == [f"{tmp_path.name}/A", "x/A"]
    assert adapters["x/A"].modules.popitem()[1].rank == 8


def test_a_source_stands_for_its_label():
    named = by_label({"x/A": 1, "B": 2, "C": 3}, ["A", "B"], ["x/A", "x/B"])
    assert named == {"A": 1, "B": 2, "C": 3}  # what is neither is refused where it is used
    assert by_label({"b": 1}, ["b", "b-2"], ["x/b", "b"]) == {"b": 1}  # a label comes first
    recipe = with_labels(Recipe(weights={"x/A": 0.5}, extras="x/B"), ["A", "B"], ["x/A", "x/B"])
    assert recipe.weights == {"A": 0.5} and recipe.extras == "B"
    assert with_labels(Recipe(extras="average"), ["A"], ["x/A"]).extras == "average"
