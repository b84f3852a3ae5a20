"""The file of a fit that is not finished."""

from __future__ import annotations

import copy

import torch
from torch import nn

from coremerge import Adapter
from coremerge.learning.kept import Kept, mark_of, mark_of_model
from coremerge.lowrank import LowRank


def test_modules_come_back_as_they_were(tmp_path):
    path, cores = tmp_path / "kept", {name: torch.randn(3, 4, dtype=torch.float64) for name in "abc"}
    first = Kept(path, "mark")
    for name in "ab":
        first.put(name, cores[name], {"tokens": 3})
    first.write()
    size = path.stat().st_size
    first.write()
    assert path.stat().st_size == size
    first.put("c", cores["c"], {})  # never written
    first.close()
    again = Kept(path, "mark")
    assert set(again.cores) == {"a", "b"} and again.said == {"a": {"tokens": 3}, "b": {"tokens": 3}}
    assert all(torch.equal(again.cores[name], cores[name]) for name in "ab")
    again.put("c", cores["c"], {})
    again.write()
    assert path.stat().st_size < 2 * size
    again.close()
    assert set(Kept(path, "mark").cores) == set("abc")


def test_nothing_is_written_without_a_path():
    kept = Kept(None, "mark")
    kept.put("layer", torch.zeros(1), {})
    kept.write()
    kept.close()
    assert set(kept.cores) == {"layer"}


def adapter(*scales):
    return {
        "a": Adapter.from_updates(
            {f"l{i}": LowRank(s * torch.ones(2, 1), torch.ones(1, 2)) for i, s in enumerate(scales)}
        )
    }


def test_all_that_matters_changes_the_mark(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last = copy.deepcopy(model)
    last[1].bias.data *= 1.5
    data, moved = ({"a": [{"x": torch.full((1,), value)}]} for value in (0.0, 1.0))
    model, last = mark_of_model(model), mark_of_model(last)
    settings = {"rank": 1}
    marks = {
        mark_of(model, adapter(1, 1), data, settings),
        mark_of(model, adapter(2, 1), data, settings),
        mark_of(model, adapter(1, 2), data, settings),
        mark_of(model, adapter(1, 1), moved, settings),
        mark_of(model, adapter(1, 1), data, {"rank": 2}),
        mark_of(last, adapter(1, 1), data, settings),
        mark_of(model, {"b": adapter(1, 1)["a"]}, data, settings),
    }
    assert mark_of(model, adapter(1, 1), data, settings) in marks
    monkeypatch.setattr("coremerge.learning.kept.__version__", "0.0.0")
    assert len(marks | {mark_of(model, adapter(1, 1), data, settings)}) == 8
