"""The file of a fit that is not finished."""

from __future__ import annotations

import torch
from torch import nn

from coremerge import Adapter
from coremerge.learning.kept import Kept, mark_of
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


def test_all_that_matters_changes_the_mark():
    model = nn.Linear(2, 2)
    one = {"a": Adapter.from_updates({"layer": LowRank(torch.ones(2, 1), torch.ones(1, 2))})}
    other = {"a": Adapter.from_updates({"layer": LowRank(2 * torch.ones(2, 1), torch.ones(1, 2))})}
    data = {"a": [{"x": torch.zeros(1)}]}
    moved = {"a": [{"x": torch.ones(1)}]}
    settings = {"rank": 1}
    marks = {
        mark_of(model, one, data, settings),
        mark_of(model, other, data, settings),
        mark_of(model, one, moved, settings),
        mark_of(model, one, data, {"rank": 2}),
        mark_of(nn.Linear(2, 2), one, data, settings),
        mark_of(model, {"b": one["a"]}, data, settings),
    }
    assert len(marks) == 6
    assert mark_of(model, one, data, settings) in marks
