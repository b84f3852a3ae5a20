"""The shipped examples are complete, small, and score what their cards say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coremerge.evaluation import Evaluator, TaskSet, read_taskset
from coremerge.evaluation.taskset import Row
from coremerge.formats import load

FOLDER = Path(__file__).parents[2] / "examples" / "minilm-wordnet"
SECOND = FOLDER.with_name("minilm-wordnet-16")
WORDNET = Path("/usr/share/wordnet")


def texts(row: Row) -> tuple[str | None, str | None]:
    return row.example.text, row.example.pair


@pytest.fixture(scope="module")
def taskset() -> TaskSet:
    return read_taskset(FOLDER)


@pytest.fixture(scope="module", params=[FOLDER, SECOND], ids=lambda folder: folder.name)
def each(request: pytest.FixtureRequest) -> TaskSet:
    return read_taskset(request.param)


def test_it_has_eight_tasks_two_of_them_regressions_and_stays_small(taskset: TaskSet) -> None:
    kinds = [task.kind for task in taskset.tasks.values()]
    assert (len(kinds), kinds.count("regression")) == (8, 2)
    shipped = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in shipped) < 15e6


def test_every_row_is_read_and_no_test_row_is_a_validation_row(each: TaskSet) -> None:
    for name in each.tasks:
        validation, test = (each.rows(name, split) for split in ("validation", "test"))
        assert (len(validation) >= 400, len(test) >= 1000) == (True, True)
        assert not {texts(row) for row in validation} & {texts(row) for row in test}


def test_the_adapters_differ_in_type_rank_and_scale(taskset: TaskSet) -> None:
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in taskset.own().values()]
    lora = [config for config in configs if config["peft_type"] == "LORA"]
    assert sorted(config["peft_type"] for config in configs) == ["LORA"] * 7 + ["VERA"]
    assert {config["r"] for config in lora} == {8, 16, 32}
    assert all(config["lora_alpha"] != config["r"] for config in lora)
    assert sum(config["use_rslora"] for config in lora) == 1
    assert {config["base_model_name_or_path"] for config in configs} == {taskset.base and taskset.base.hub_id}


def test_the_second_ones_adapters_are_alike() -> None:
    paths = read_taskset(SECOND).own().values()
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in paths]
    assert [(c["peft_type"], c["r"], c["lora_alpha"], c["use_rslora"]) for c in configs] == [
        ("LORA", 16, 32, False)
    ] * 6
    assert sum(file.stat().st_size for file in SECOND.rglob("*") if file.is_file()) < 6e6


def test_own_scores_are_those_of_the_cards(each: TaskSet) -> None:
    adapters = {name: load(path) for name, path in each.own().items()}
    own = Evaluator(each, adapters).own("validation").raw
    for name, score in own.items():
        stated = json.loads((each.folder / "adapters" / name / "scores.json").read_text())["validation"]
        assert score == pytest.approx(stated["own"], abs=0.005)  # a row of 200 may fall to the other side
        assert stated["own"] > stated["no_adapter"] + 0.02
        assert f"{stated['own']:.4f}" in (each.folder / "adapters" / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not WORDNET.is_dir(), reason="needs Debian's wordnet-base")
@pytest.mark.parametrize("folder", [FOLDER, SECOND], ids=lambda folder: folder.name)
def test_the_rows_are_cut_again_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / folder.name
    out.mkdir()
    train = [sys.executable, str(FOLDER / "train.py"), "--set", str(out), "--data-only", "--wordnet", str(WORDNET)]
    subprocess.run(train, check=True)
    shipped = {file.name: file.read_bytes() for file in (folder / "data").iterdir()}
    assert {file.name: file.read_bytes() for file in (out / "data").iterdir()} == shipped
