"""The benchmarks of scale run, in short; the cluster's own test is that of its executor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.scale import cost, memory
from benchmarks.speed.process import Usage
from benchmarks.speed.scaling import square


def test_constants_and_what_they_tell(tmp_path: Path) -> None:
    listed = [square(16, layers, 2, 2) for layers in (1, 2, 3, 4)]
    _, found = cost.fitted(listed, tmp_path, 1)
    assert [row[0] for row in found["constants"]] == ["TALL", "CORE", "BYTE", "MODULE"]  # type: ignore[index]
    assert len(found["merges"]) == 4 and not list(tmp_path.iterdir())  # type: ignore[index]


def test_on_paper(tmp_path: Path) -> None:
    cost.main(["--only", "paper", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["Scale: cost on paper"]["numbers"]
    assert [row[1] for row in rows] == [882, 882, 46080, 1280000] and all(min(row[2:]) > 0 for row in rows)


def test_memory_and_time_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(command: list[object]) -> Usage:
        out = Path(str(command[command.index("-o") + 1]))
        out.mkdir()
        (out / "a.safetensors").write_bytes(b"")
        return Usage(1.0, 1.0, 10**6)

    monkeypatch.setattr(memory, "measure", ran)
    monkeypatch.setattr(cost, "measure", ran)
    memory.main(["--quick", "--work", str(tmp_path)])
    cost.main(["--quick", "--only", "check", "--work", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row[-1] for row in found["Scale: memory against layers"]["numbers"]] == [1.0, 1.0]
    assert found["Scale: cost told and taken"]["numbers"][0][4] == 1.0
