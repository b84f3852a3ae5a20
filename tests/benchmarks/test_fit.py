"""How inputs are drawn for the fits that are compared."""

from __future__ import annotations

import pytest
import torch
from benchmarks.accuracy.fit import (
    equal,
    first_batch,
    fitted,
    inputs,
    over_size,
    own_inputs,
    random_tokens,
    twice,
    weighted,
)
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


def test_variants_are_other_fits(bench: Bench) -> None:
    data = inputs(bench, 0, 32)
    made = [make(bench)(data).adapter for make in (fitted, own_inputs)]
    made += [weighted(bench, weights)(data).adapter for weights in (equal, over_size)]
    made.append(fitted(bench)(first_batch(data)).adapter)
    first, last = sorted(made[0])[0], sorted(made[0])[-1]
    for other in made[1:]:
        assert not torch.allclose(made[0][last].dense(), other[last].dense(), rtol=1e-3, atol=1e-6)
    assert {len(ids(listed)) for listed in first_batch(data).values()} == {16}
    query = next(name for name in sorted(made[0]) if name.endswith("layer.0.attention.self.query"))
    assert first == "encoder.layer.0.attention.output.dense"
    torch.testing.assert_close(made[0][query].dense(), made[1][query].dense())  # nothing was merged before it
    again = twice(bench)(data).adapter  # held against a prior that has seen all inputs, it is not better on any
    torch.testing.assert_close(again[last].dense(), made[0][last].dense(), rtol=1e-3, atol=1e-6)
