"""Short forms of the slow campaigns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_runs_that_are_killed_leave_all_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.kill", "--moments", "1", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)  # by itself: it forks
    rows = json.loads((tmp_path / "results.json").read_text())["Reliability: killed"]["numbers"]
    labels = [f"{name}{resume}" for name in ("merge", "merge --into", "fit") for resume in ("", " --resume")]
    assert [row[0] for row in rows] == [*labels, "batch", "batch, run again"]
    assert all(row[1] + row[2] >= 1 for row in rows) and rows[5][3] + rows[5][2] == 1
    assert rows[6][1] + rows[6][2] == 4 and (rows[7][1] + rows[7][2]) % 4 == 0 and rows[7][3] <= 1


def test_broken_files_are_read_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.fuzz", "--count", "150", "--results", str(tmp_path)]
    subprocess.run([*command, "--findings", str(tmp_path / "found")], check=True, capture_output=True)  # limits memory
    rows = json.loads((tmp_path / "results.json").read_text())["Reliability: broken files"]["numbers"]
    assert len(rows) == 10
    for _, changed, read, refused, findings, _ in rows:
        assert read + refused == changed == 150 and not findings and read and refused


def test_faults_are_one_message_and_lose_nothing(tmp_path: Path) -> None:
    faults = ["disk full at the tensors", "files may not be large", "weights written over after", "two processes"]
    chosen = [word for fault in faults for word in ("--only", fault)]
    chosen += ["--command", "merge --overwrite", "--command", "merge --resume", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.reliability.faults", *chosen]
    subprocess.run(command, check=True, capture_output=True)  # by itself: it forks
    rows = json.loads((tmp_path / "results.json").read_text())["Reliability: faults"]["numbers"]
    assert len(rows) == 2 * len(faults)
    assert all(row[2] == 1 and row[3] for row in rows[:-2] if not row[3].startswith("skipped"))


def test_odd_numbers_merge_right_or_are_refused(tmp_path: Path) -> None:
    arguments = ["--count", "4", "--short", "12", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.reliability.numbers", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    numbers = json.loads((tmp_path / "results.json").read_text())["Reliability: numbers"]["numbers"]
    for label, cases, right, exact, rounded, warned, refused, findings in numbers["faults"]:
        assert right + warned + refused == cases == 4 and not findings, label
        assert exact <= 1e-9 and rounded <= 2
    merges, lifted, apart = numbers["short"]
    assert 0 < lifted <= merges == 12 and apart <= 1e-5
