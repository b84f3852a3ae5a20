"""What is handed in is refused before anything is run, alike by fit and learn_weights."""

from __future__ import annotations

import pytest
import torch

from coremerge import Adapter
from coremerge.errors import InputError
from coremerge.learning import fit, learn_weights
from coremerge.lowrank import LowRank

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
