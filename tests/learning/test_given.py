"""What is handed in is refused before anything is run, alike by fit and learn_weights."""

from __future__ import annotations

import pytest
import torch

from coremerge import Adapter
from coremerge.errors import InputError
from coremerge.learning import fit, learn_weights, measure_null_space
from coremerge.lowrank import LowRank
from families import make_adapter, make_model

ONE = Adapter.from_updates({"0": LowRank(torch.ones(3, 1), torch.ones(1, 3))})
ROW = {"input": torch.ones(1, 3)}


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("function", [fit, learn_weights])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"a": ["w1 w2", "w3"]}, r"data\.a\[0\]: a batch is a mapping, not a str"),
        ({"a": [ROW, None]}, r"data\.a\[1\]: a batch is a mapping, not a NoneType"),
        ({"a": torch.ones(2, 3)}, r"data\.a\[0\]: a batch is a mapping, not a Tensor"),
        ({"a": ROW}, "a list of batches is needed, not one batch"),
        ({"a": "inputs.jsonl"}, "a list of batches is needed, not a str"),
        ({"a": 3}, "a list of batches is needed, not a int"),
        ({"a": [{"input_ids": [[1, 2]]}]}, r"data\.a\[0\]\.input_ids: a tensor is needed, not a list"),
        ({"a": [{"tokens": [[1, 2]]}]}, "a batch without inputs"),
        ({"a": [{"input_ids": torch.ones(0, 4, dtype=torch.long)}]}, "a batch without inputs"),
        ({"a": []}, "no inputs"),
        ([ROW], "batches by task are needed, not a list"),
    ],
)
def test_what_is_no_batch(model, function, data, said):
    with pytest.raises(InputError, match=said):
        function(model, {"a": ONE}, data)


@pytest.mark.parametrize("function", [fit, learn_weights])
@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ({"a": "adapters/a"}, r"adapters\.a: an adapter is needed, not a str. Load it"),
        (["adapters/a"], r"adapters\.0: an adapter is needed, not a str"),
        ("adapters/a", "not one str"),
        (ONE, "not one Adapter"),
        ({}, "no adapters given"),
    ],
)
def test_what_is_no_adapter(model, function, adapters, said):
    with pytest.raises(InputError, match=said):
        function(model, adapters, {"a": [ROW]})


def test_batches_may_come_one_by_one(model):
    assert fit(model, {"a": ONE}, {"a": (ROW for _ in range(2))}).report.fits["0"].tokens == 2


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoders_tokens_are_counted_by_its_own_mask(masked, tmp_path):
    """Also where its inputs are as long as its encoder's."""
    read, said = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
    read[0, 4:], said[1, 2:] = 0, 0
    generator = torch.Generator().manual_seed(0)
    ids = {key: torch.randint(3, 30, (3, 7), generator=generator) for key in ("input_ids", "decoder_input_ids")}
    batch = {**ids, "attention_mask": read} | ({"decoder_attention_mask": said} if masked else {})
    before = {key: value.clone() for key, value in batch.items()}
    fits = fit(
        make_model("t5"),
        {"a": make_adapter("t5", tmp_path / "a", 0)} | {"b": make_adapter("t5", tmp_path / "b", 1)},
        {"a": [batch], "b": [batch]},
    ).report.fits
    counts = {name: one.tokens for name, one in fits.items()}
    assert {n for name, n in counts.items() if name.startswith("encoder")} == {2 * int(read.sum())}
    own = {n for name, n in counts.items() if name.startswith("decoder") and "EncDec" not in name}
    assert own == {2 * int(said.sum()) if masked else 2 * said.numel()}
    adapters = {"a": make_adapter("t5", tmp_path / "a", 0)}
    longer = {key: torch.nn.functional.pad(batch[key], (0, 1)) for key in batch if key.startswith("decoder")}
    if not masked:
        longer["decoder_attention_mask"] = torch.nn.functional.pad(torch.ones_like(said), (0, 1))
    (one, other) = (
        measure_null_space(make_model("t5"), adapters, {"a": [given]})["a"]["a"] for given in (batch, batch | longer)
    )
    assert one == pytest.approx(other)
    assert batch.keys() == before.keys() and all(torch.equal(batch[key], before[key]) for key in before)
