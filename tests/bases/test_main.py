"""python -m coremerge.bases."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fake_packages import make_dinov2


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr("sys.argv", ["bases", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("coremerge.bases", run_name="__main__")
    return end.value.code


def test_the_folder_is_printed(
    site: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dinov2(site, monkeypatch)
    assert run(monkeypatch, "dinov2") == 0
    assert Path(capsys.readouterr().out.strip()).parent == cache_folder / "bases"


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "dino") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and "no such converter" in err
