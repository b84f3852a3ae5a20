"""Short forms of the slow campaigns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_runs_that_are_killed_leave_all_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.kill", "--moments", "4", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)  # by itself: it forks
    rows = json.loads((tmp_path / "results.json").read_text())["Reliability: killed"]["numbers"]
    assert [row[0] for row in rows] == ["merge", "merge --resume", "merge --into", "merge --into --resume"]
    assert all(row[1] + row[2] >= 4 for row in rows) and rows[3][3] + rows[3][2] == 4


def test_broken_files_are_read_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.fuzz", "--count", "150", "--results", str(tmp_path)]
    subprocess.run([*command, "--findings", str(tmp_path / "found")], check=True, capture_output=True)  # limits memory
    rows = json.loads((tmp_path / "results.json").read_text())["Reliability: broken files"]["numbers"]
    assert len(rows) == 7
    for _, changed, read, refused, findings, _ in rows:
        assert read + refused == changed == 150 and not findings and read and refused
