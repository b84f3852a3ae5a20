"""A fit's inputs shared out among other processes: here they are sent, run in this one, and now and then lost."""

from __future__ import annotations

import pickle
from itertools import chain

import pytest
import torch

from coremerge.errors import InputError
from coremerge.executors import shares
from coremerge.learning import fit, learn_weights
from coremerge.learning.passes import LOTS, lots_of
from families import batches, make_adapter, make_model
from posted import Posted


def adapters_of(family, folder):
    return {name: make_adapter(family, folder / name, seed=seed) for seed, name in enumerate("ab", 1)}


def data_of(family, counts=(5, 2)):
    return {name: batches(family, count, seed) for seed, (name, count) in enumerate(zip("ab", counts, strict=True), 1)}


def weights(result, folder):
    return (result.adapter.save(folder).path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {}),
        ("bert", {"rank": 2, "prior": "router"}),
        ("bert", {"rank_budget": 3, "spill": True}),
        ("t5", {"rank": 2}),
        ("llava", {}),
    ],
)
def test_the_bytes_are_those_of_one_process(family, settings, tmp_path):
    adapters, data = adapters_of(family, tmp_path), data_of(family)
    here = fit(make_model(family), adapters, data, **settings)
    there = fit(make_model(family), adapters, data, executor=Posted(), **settings)
    assert weights(here, tmp_path / "here") == weights(there, tmp_path / "there")
    assert here.report.fits == there.report.fits and here.report.states == there.report.states


def test_a_fit_goes_on_elsewhere(tmp_path):
    adapters, data, kept = adapters_of("bert", tmp_path), data_of("bert"), tmp_path / "kept"
    whole = fit(make_model("bert"), adapters, data)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model("bert"), adapters, data, resume=kept, progress=lambda done, count: done < count / 2)
    rest = fit(lambda: make_model("bert"), adapters, data, resume=kept)
    assert weights(whole, tmp_path / "whole") == weights(rest, tmp_path / "rest")


def test_refusals_come_back(tmp_path):
    adapters, data = adapters_of("bert", tmp_path), data_of("bert")
    model = make_model("bert")
    model.bert.encoder.layer[1].output.dense.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite"):
        fit(model, adapters, data, executor=Posted())


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_lots_hold_each_batch_once_with_the_rows_before_it(count):
    listed = batches("bert", count)
    lots = lots_of({"a": listed, "b": listed[:1]})
    first = [numbered for lot in lots if lot.task == "a" for numbered in lot.batches]
    assert [j for j, _, _ in first] == list(range(count)) and [rows for _, rows, _ in first] == [
        3 * j for j in range(count)
    ]
    assert all(batch is listed[j] for j, _, batch in first) and len(lots) <= LOTS + 1
    for processes in (1, 2, 3, 50):
        assert list(chain(*shares(lots, processes))) == lots


def test_an_adapter_that_is_sent_is_the_same(tmp_path):
    adapter = make_adapter("bert", tmp_path, 1)
    sent = pickle.loads(pickle.dumps(adapter))
    assert sent.modules == adapter.modules and sent.info == adapter.info and list(sent) == list(adapter)
    for name in adapter:
        assert torch.equal(sent[name].left, adapter[name].left) and sent[name].left.dtype == torch.float64
        assert sent.read(name).left.dtype == adapter.read(name).left.dtype
        assert torch.equal(sent.read(name, torch.float16).right, adapter.read(name, torch.float16).right)


@pytest.mark.parametrize("settings", [{}, {"objective": "match", "per": "adapter", "fixed_total": True}])
def test_weights_are_learned_the_same_elsewhere(tmp_path, settings):
    adapters, data = adapters_of("bert", tmp_path), data_of("bert")
    here, there = (
        learn_weights(make_model("bert"), adapters, data, steps=5, executor=executor, **settings)
        for executor in (None, Posted())
    )
    assert here.table == there.table and torch.equal(here.objective, there.objective)
    assert len(set(here.table["a"].values())) > 1 or settings
