"""The file of merge weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from coremerge.errors import OutputError, SourceError
from coremerge.learning import Weights, read_weights

WEIGHTS = Weights(
    {"a": {"m": 0.1, "n": (0.2, -0.3)}, "ü/b": {"m": 1.0}},
    {"objective": "nsc", "bounds": None},
    ("a",),
    torch.tensor([[0.5], [0.4]]),
    torch.rand(3, 4),
    {"step": torch.tensor(2.0)},
    ("a note",),
)


def test_it_reads_back(tmp_path):
    WEIGHTS.save(tmp_path / "new" / "w.safetensors")
    found = read_weights(tmp_path / "new" / "w.safetensors")
    assert found.table == WEIGHTS.table and dict(found) == WEIGHTS.table and len(found) == 2
    assert (found.settings, found.tasks, found.notes) == (WEIGHTS.settings, WEIGHTS.tasks, WEIGHTS.notes)
    assert torch.equal(found.path, WEIGHTS.path) and torch.equal(found.objective, WEIGHTS.objective)
    assert found.state == WEIGHTS.state and found.steps == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_file_is_not_overwritten_unless_asked(tmp_path):
    WEIGHTS.save(tmp_path / "w.safetensors")
    with pytest.raises(OutputError, match="exists"):
        WEIGHTS.save(tmp_path / "w.safetensors")
    WEIGHTS.save(tmp_path / "w.safetensors", overwrite=True)
    with pytest.raises(OutputError):
        WEIGHTS.save(tmp_path / "w.safetensors" / "below")


@pytest.mark.parametrize(
    ("metadata", "values", "message"),
    [
        (None, [1.0], "not written by"),
        ({"format": "other"}, [1.0], "not written by"),
        ({"format": "coremerge.weights.1"}, [1.0], "layout"),
        ({"format": "coremerge.weights.1", "layout": "{", "settings": "{}"}, [1.0], "no file of merge weights"),
        ({"layout": '{"a": {"m": 0}}'}, [1.0, 2.0], "not as many weights as modules have"),
        ({"layout": '{"a": {"m": 0, "n": 3}}'}, [1.0, 2.0], "not as many weights as modules have"),
        ({"layout": '{"a": {"m": 0}}'}, [float("nan")], "not finite"),
    ],
)
def test_another_file_is_refused(tmp_path, metadata, values, message):
    rest = {"settings": "{}", "tasks": "[]", "notes": "[]", "format": "coremerge.weights.1"}
    if metadata and set(metadata) == {"layout"}:
        metadata = rest | metadata
    tensors = {"weights": torch.tensor(values), "objective": torch.zeros(0, 0), "path": torch.zeros(1, 1)}
    save_file(tensors, tmp_path / "w.safetensors", metadata)
    with pytest.raises(SourceError, match=message):
        read_weights(tmp_path / "w.safetensors")


def test_nothing_there_and_no_safetensors(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        read_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_text("weights")
    with pytest.raises(SourceError, match="no file of merge weights"):
        read_weights(tmp_path / "w.safetensors")
