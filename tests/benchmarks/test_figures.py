"""Figures, the README's tables and counts of operations, from the committed numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks.figures import FIGURES, FOLDER, draw_all
from benchmarks.readme import ROOT, TABLES, filled
from benchmarks.speed import operations, others
from benchmarks.speed.shapes import SHAPES

from benchmarks import results

KNOWN = json.loads((results.ROOT / "results.json").read_text())


@pytest.mark.slow
def test_every_figure_is_drawn(tmp_path: Path) -> None:
    missing = draw_all({name: section["numbers"] for name, section in KNOWN.items()}, tmp_path)
    assert missing == []
    assert (
        {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES) == {path.stem for path in FOLDER.glob("*.png")}
    )


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    missing = draw_all({}, tmp_path)
    assert len(missing) == len(FIGURES)
    assert "cost: Speed: how cost grows is not in results.json" in missing


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_pages_are_those_of_the_results(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert filled(text, KNOWN, TABLES[name]) == text
    with pytest.raises(ValueError, match="begin and end"):
        filled("no marks", KNOWN, TABLES[name])


def test_results_name_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--work", "/somewhere", "--only", "one module", "--results=/there"])
    assert results.command().endswith(" --only 'one module'")
    for text in ((results.ROOT / "RESULTS.md").read_text(), json.dumps(KNOWN)):
        assert "--work" not in text and "/tmp" not in text and "/home" not in text


def test_counts_grow_as_theory_says() -> None:
    assert operations.core(8192, 8192, 6, 16) / operations.core(4096, 4096, 6, 16) < 2
    assert operations.dense(8192, 8192, 6, 16) / operations.dense(4096, 4096, 6, 16) == pytest.approx(8, rel=0.01)
    assert operations.knots(4096, 4096, 12, 16) / operations.knots(4096, 4096, 6, 16) == pytest.approx(2, rel=0.3)
    assert operations.thin_svd(3, 7) == operations.thin_svd(7, 3)


def test_other_tools_get_what_this_one_gets(tmp_path: Path) -> None:
    shape = others.llama_like(SHAPES["vit-b"])
    assert shape.parameters == SHAPES["vit-b"].parameters
    listed = list(others.contests(SHAPES["tiny"], tmp_path, tmp_path / "out"))
    assert [one.label for one in listed][:2] == ["floor", "coremerge merge"]
    recipe = json.loads(next(tmp_path.glob("mergekit-*.yml")).read_text())
    assert len(recipe["models"]) == SHAPES["tiny"].adapters
