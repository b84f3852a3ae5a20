"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tiny import make_adapter

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs ``coremerge`` with its arguments, in a folder that holds the adapters A, B and C."""
    make_adapter(tmp_path / "A", seed=1)
    make_adapter(tmp_path / "B", 6, seed=2, use_rslora=True)
    make_adapter(tmp_path / "C", 2, seed=3, layers=1, parts=("q_proj",))
    monkeypatch.chdir(tmp_path)

    def runner(*words: str) -> Result:
        from coremerge.cli._app import app

        monkeypatch.setattr("sys.argv", ["coremerge", *words])
        return CliRunner().invoke(app, list(words), catch_exceptions=False, prog_name="coremerge")

    return runner
