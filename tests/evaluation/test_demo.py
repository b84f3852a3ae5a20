from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from coremerge import Recipe
from coremerge.cli import demo as command
from coremerge.demo import CANDIDATES, FITTED, run_demo
from coremerge.errors import SourceError

TWO = {"sum": Recipe(method="sum", steps=[], scale=0.5), "tsv": CANDIDATES["core TSV"]}


def test_rows_are_own_none_and_one_per_candidate(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    result = run_demo(folder, candidates=TWO, progress=lambda *call: calls.append(call))
    labels = ["own adapter", "no adapter", "sum", "tsv", FITTED]
    assert [row.label for row in result.rows] == labels
    assert calls == [(label, i, 5) for i, label in enumerate([*labels, "done"])]
    assert result["own adapter"].scores.mean == 1.0
    assert result["sum"].scale == 0.5
    assert result["tsv"].seconds is not None
    json.dumps(result.to_dict())


def test_a_tuned_scale_of_one_factor_is_the_default(folder: Path) -> None:
    result = run_demo(folder, candidates=TWO, full=True)
    assert result[FITTED].tuned is None
    for row in result.rows[2:-1]:
        assert row.tuned is not None
        assert (row.tuned_scale == row.scale) == (row.tuned is row.scores)


def run(*arguments: str) -> str:
    app = Typer()
    app.command()(command.demo)
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_prints_both_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_example", lambda: folder)
    text = run("-q")
    for label in ("own adapter", "no adapter", *CANDIDATES, "normalised", "colour", "length", "A quick look"):
        assert label in text
    assert "A quick look" not in run("-q", "--full")


def test_the_command_prints_json(folder: Path) -> None:
    rows = json.loads(run(str(folder), "--json"))["rows"]
    assert [row["label"] for row in rows[2:]] == [*CANDIDATES, FITTED]
    assert rows[0]["scores"]["mean"] == 1.0


def test_the_example_is_found_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / command.EXAMPLE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert command.find_example() == tmp_path / command.EXAMPLE


def test_without_the_example_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "__file__", str(tmp_path / "a" / "b" / "c" / "demo.py"))
    with pytest.raises(SourceError, match="clone"):
        command.find_example()


def test_nothing_heavy_is_imported_with_the_command() -> None:
    code = "import sys, coremerge.cli.demo; print({'torch', 'transformers', 'rich.table'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
