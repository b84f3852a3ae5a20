from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from coremerge.errors import MismatchError, MissingExtraError, SourceError
from coremerge.evaluation.encoder import BATCH, Encoder
from coremerge.evaluation.taskset import Row, read_taskset
from coremerge.learning.rows import Example
from coremerge.lowrank import LowRank
from tolerances import SINGLE

MODULE = "encoder.layer.0.attention.self.query"


def row(text: str, pair: str | None = None) -> Row:
    return Row(Example(text, pair), 0.0)


ROWS = [row("red"), row("green blue cat dog"), row("red tree tree"), row("cat")]
PAIRS = [row("red", "tree tree"), row("green blue", "cat")]


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(read_taskset(folder))


def update(m: int = 16, n: int = 16) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    return LowRank(torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator))


@pytest.mark.parametrize("rows", [ROWS, PAIRS])
def test_features_are_token_means_in_the_rows_order(encoder: Encoder, rows: list[Row]) -> None:
    features = encoder.features(encoder.batches(rows))
    for given, feature in zip(rows, features, strict=True):
        tokens = encoder.processor(given.example.text, given.example.pair, return_tensors="pt")
        expected = encoder.model(**tokens).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, expected, atol=SINGLE, rtol=SINGLE)


def test_in_half_precision_features_are_near(encoder: Encoder, folder: Path) -> None:
    short = Encoder(read_taskset(folder).model_copy(update={"dtype": "bfloat16"}))
    assert next(short.model.parameters()).dtype == torch.bfloat16
    features = short.features(short.batches(ROWS))
    exact = encoder.features(encoder.batches(ROWS))
    torch.testing.assert_close(features, exact, atol=0.1, rtol=0.1)  # bfloat16 has 8 bits, and layers add up
    assert features.dtype == torch.float32
    assert short.batches([row("red")])[0][1]["input_ids"].dtype == torch.long


def test_long_rows_are_cut(encoder: Encoder) -> None:
    ((_, batch),) = encoder.batches([row("red " * 50)])
    assert batch["input_ids"].shape == (1, 12)


def test_batches_are_of_similar_lengths(encoder: Encoder) -> None:
    rows = [row("red " * (1 + i % 7)) for i in range(2 * BATCH)]
    batches = encoder.batches(rows)
    assert [batch["input_ids"].shape[1] for _, batch in batches] == sorted(b["input_ids"].shape[1] for _, b in batches)
    assert torch.cat([places for places, _ in batches]).sort().values.tolist() == list(range(2 * BATCH))


def test_the_base_carries_an_update_and_gets_its_own_bits_back(encoder: Encoder) -> None:
    weight = encoder.model.get_parameter(f"{MODULE}.weight")
    before = weight.clone()
    with encoder.carrying({MODULE: update()}, scale=0.5):
        torch.testing.assert_close(weight.data, before + 0.5 * update().dense())
    assert torch.equal(weight, before)


def test_the_base_is_restored_after_an_error(encoder: Encoder) -> None:
    before = encoder.model.get_parameter(f"{MODULE}.weight").clone()
    with pytest.raises(ZeroDivisionError), encoder.carrying({MODULE: update()}):
        raise ZeroDivisionError
    assert torch.equal(encoder.model.get_parameter(f"{MODULE}.weight"), before)


def test_an_embedding_is_a_transposed_linear_map(encoder: Encoder) -> None:
    name = "embeddings.word_embeddings"
    weight = encoder.model.get_parameter(f"{name}.weight")
    before, change = weight.clone(), update(16, len(weight))
    with encoder.carrying({name: change}):
        torch.testing.assert_close(weight.data, before + change.dense().T)
    assert torch.equal(weight, before)


def test_a_convolution_is_flattened(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = nn.Conv1d(3, 4, 2).requires_grad_(False)
    monkeypatch.setattr(encoder, "model", nn.ModuleDict({"conv": convolution}))
    before, change = convolution.weight.clone(), update(4, 6)
    with encoder.carrying({"conv": change}):
        torch.testing.assert_close(convolution.weight.data, before + change.dense().reshape(4, 3, 2))


@pytest.mark.parametrize(
    ("name", "change"), [("encoder.layer.9", update()), (MODULE, update(8)), ("encoder", update())]
)
def test_an_update_that_does_not_fit_is_refused(encoder: Encoder, name: str, change: LowRank) -> None:
    with pytest.raises(MismatchError, match=name), encoder.carrying({name: change}):
        pass


def test_a_base_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    taskset = read_taskset(folder)
    missing = taskset.base.model_copy(update={"hub_id": str(tmp_path / "nowhere"), "package": "no_such_package"})
    with pytest.raises(SourceError, match="no_such_package"):
        Encoder(taskset.model_copy(update={"base": missing}))


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[evaluate\]"):
        Encoder(read_taskset(folder))
