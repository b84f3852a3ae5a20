"""The benchmark scripts still run, and measure what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.speed import dense, fit, learning, run, scaling, shapes
from benchmarks.speed.shapes import SHAPES

from benchmarks import results
from coremerge import load, merge


def test_a_set_is_a_function_of_its_seed(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    first, second = (shapes.files(shapes.make(shape, tmp_path / name)) for name in "ab")
    other = shapes.files(shapes.make(replace(shape, seed=1), tmp_path / "a"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert not {file.read_bytes() for file in first} & {file.read_bytes() for file in other}


def test_a_set_loads_and_its_spectra_decay(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    adapter = load(shapes.make(shape, tmp_path)[0])
    assert {name: update.shape for name, update in adapter.items()} == dict(shape.shapes())
    assert sum(module.parameters for module in adapter.modules.values()) == shape.parameters
    values = adapter["model.layers.0.self_attn.q_proj"].svd.values
    assert values[0] > 2 * values[-1] > 0


def test_dense_tsv_is_ours_where_it_keeps_as_much() -> None:
    made = [shapes.factors(replace(SHAPES["tiny"], rank=4), (8, 8), i, 0) for i in range(2)]
    ours = run.merge_module(made)
    values = torch.linalg.svdvals(dense.tsv([b @ a for a, b in made]).double())
    scaled = ours.dense() / ours.svd.values.mean() * values.mean()
    left, _, right = dense.svd(dense.tsv([b @ a for a, b in made]))
    flat = left @ right * values.mean().float()
    torch.testing.assert_close(scaled.float(), flat, atol=1e-4, rtol=1e-4)  # polar factors in float32


def test_a_run_replaces_its_own_section_only(tmp_path: Path) -> None:
    results.write("A", "first", 1, seed=0, folder=tmp_path)
    results.write("B", "other", 2, seed=0, folder=tmp_path)
    results.write("A", "second", 3, seed=0, folder=tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "first" not in page
    assert page.index("second") < page.index("other")
    assert json.loads((tmp_path / "results.json").read_text())["A"]["numbers"] == 3


def test_an_exponent_is_a_slope() -> None:
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


@pytest.mark.slow
def test_the_speed_benchmark_runs(tmp_path: Path) -> None:
    run.main(["--quick", "--work", str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_text()
    for words in ("coremerge merge", "dense TSV", "KnOTS", "PEFT svd", "PEFT cat", "on a GPU"):
        assert words in page


@pytest.mark.slow
def test_the_scaling_benchmark_runs(tmp_path: Path) -> None:
    scaling.main(["--quick", "--repeats", "1", "--work", str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("exponent") >= 4
    assert "70B-shaped" in page


@pytest.mark.slow
def test_the_learning_benchmark_runs(tmp_path: Path) -> None:
    learning.main(["--quick", "--results", str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "nsc-own × PEFT" in page and "| tasks | adapters' factors MB |" in page


def test_a_quick_merge_of_a_set(tmp_path: Path) -> None:
    merged = merge([load(folder) for folder in shapes.make(SHAPES["tiny"], tmp_path)]).adapter
    assert set(merged) == {name for name, _ in SHAPES["tiny"].shapes()}


def test_the_work_of_a_fit_is_counted_beside_a_plain_pass(tmp_path: Path) -> None:
    fit.main(["--quick", "--results", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["Speed: fitting cores"]["numbers"].values()
    assert 2 < row["fit work"] / row["plain work"] < 4
    assert min(row["peak MB, memory"], row["peak MB, disk"]) > 100
