"""How inputs are drawn for the fits that are compared."""

from __future__ import annotations

import pytest
import torch
from benchmarks.accuracy.fit import fitted, inputs, random_tokens
from benchmarks.accuracy.work import EXAMPLE, Bench, open_bench


@pytest.fixture(scope="module")
def bench() -> Bench:
    return open_bench(EXAMPLE, {"validation": 6, "test": 6}).only(["noun_topic", "polysemy"])


def ids(batches: list) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_inputs_are_drawn_by_seed_and_without_labels(bench: Bench) -> None:
    one, same, other = inputs(bench, 0, 8), inputs(bench, 0, 8), inputs(bench, 1, 8)
    assert ids(one["polysemy"]) == ids(same["polysemy"]) != ids(other["polysemy"])
    assert len(ids(one["noun_topic"])) == 8
    assert not any("label" in key for batch in one["noun_topic"] for key in batch)
    turned = inputs(bench, 0, 8, of={"noun_topic": "polysemy"})
    assert ids(turned["noun_topic"]) == ids(one["polysemy"]) == ids(turned["polysemy"])


def test_random_tokens_keep_lengths(bench: Bench) -> None:
    data = inputs(bench, 0, 8)
    scrambled = random_tokens(data)
    for one, other in zip(data["polysemy"], scrambled["polysemy"], strict=True):
        assert torch.equal(one["attention_mask"], other["attention_mask"])
        assert one["input_ids"].shape == other["input_ids"].shape
        assert not torch.equal(one["input_ids"], other["input_ids"])


def test_a_fit_of_the_example(bench: Bench) -> None:
    result = fitted(bench, rank=4)(inputs(bench, 0, 8))
    assert result.report.rank == 4 and set(result.adapter) == set(bench.adapters["polysemy"])
