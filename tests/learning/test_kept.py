"""The file of a fit that is not finished."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coremerge import Adapter
from coremerge.errors import ConfigError, SourceError
from coremerge.learning.kept import Kept, mark_of
from coremerge.lowrank import LowRank


def test_modules_come_back_as_they_were(tmp_path):
    path, core = tmp_path / "kept.safetensors", torch.randn(3, 4, dtype=torch.float64)
    first = Kept(path, "mark")
    first.put("layer", core, {"tokens": 3})
    assert not path.exists()
    first.write()
    again = Kept(path, "mark")
    assert torch.equal(again.cores["layer"], core) and again.said == {"layer": {"tokens": 3}}


def test_nothing_is_written_without_a_path():
    kept = Kept(None, "mark")
    kept.put("layer", torch.zeros(1), {})
    kept.write()
    assert set(kept.cores) == {"layer"}


def test_another_mark(tmp_path):
    path = tmp_path / "kept.safetensors"
    Kept(path, "mark").write()
    with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
        Kept(path, "other")


def test_other_files(tmp_path):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(SourceError, match="cannot be read"):
        Kept(path, "mark")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(SourceError, match="no part of a fit"):
        Kept(path, "mark")


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
