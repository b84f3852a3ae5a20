"""The vision example is whole: its tasks read, its adapters and heads load, its pictures are where the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coremerge.evaluation import TaskSet, read_taskset
from coremerge.formats import load
from coremerge.formats.safetensors_file import SafetensorsFile

FOLDER = Path(__file__).parents[2] / "examples" / "vision"
HUB_ID = "facebook/dinov2-small"
MAP, PATCHES, SIDE = 16, 8, 112


@pytest.fixture(scope="module")
def taskset() -> TaskSet:
    return read_taskset(FOLDER)


@pytest.fixture(scope="module")
def configs(taskset: TaskSet) -> list[dict[str, object]]:
    return [json.loads((path / "adapter_config.json").read_text()) for path in taskset.own().values()]


def images_of(taskset: TaskSet, name: str, split: str) -> list[Path]:
    return [Path(str(row.example.image)) for row in taskset.rows(name, split)]  # type: ignore[arg-type]


def test_it_has_nineteen_tasks_of_every_kind_and_stays_small(taskset: TaskSet) -> None:
    tasks = taskset.tasks.values()
    dense = [task for task in tasks if task.per == "pixel"]
    kinds = [task.kind for task in tasks if task.per == "input"]
    assert (len(dense), kinds.count("classification"), kinds.count("regression")) == (5, 7, 7)
    unshipped = {"work", "__pycache__"}
    shipped = [file for file in FOLDER.rglob("*") if file.is_file() and not unshipped & set(file.parts)]
    assert sum(file.stat().st_size for file in shipped) < 25e6


def test_every_row_is_read_and_shows_a_picture_of_its_own(taskset: TaskSet) -> None:
    for name in taskset.tasks:
        validation, test = (images_of(taskset, name, split) for split in ("validation", "test"))
        assert (len(validation), len(test)) == (100, 300), name
        assert len({*validation, *test}) == 400, name


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_pictures_are_of_the_side_that_the_base_takes(taskset: TaskSet) -> None:
    pictures = {path for name in taskset.tasks for path in images_of(taskset, name, "test")[:5]}
    assert {size_of(path) for path in pictures} == {(SIDE, SIDE)}


def test_every_domain_has_unlabelled_pictures() -> None:
    listed = sorted((FOLDER / "data").glob("*.jsonl"))
    listed = [path for path in listed if path.stem.count(".") == 0]
    assert len(listed) == 7
    for path in listed:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 64
        assert all(row.keys() == {"image"} and (path.parent / row["image"]).is_file() for row in rows)


def test_maps_have_four_places_a_patch(taskset: TaskSet) -> None:
    for name, task in taskset.tasks.items():
        if task.per == "pixel":
            maps = [row.label for row in taskset.rows(name, "validation")]
            assert {size_of(path) for path in maps if isinstance(path, Path)} == {(MAP, MAP)}


def test_adapters_load_and_heads_fit_their_tasks(taskset: TaskSet) -> None:
    for name, path in taskset.own().items():
        task = taskset.tasks[name]
        assert len(load(path)) >= 24
        outputs = (len(task.classes) or task.outputs) * ((MAP // PATCHES) ** 2 if task.per == "pixel" else 1)
        for file in ("head", "probe"):
            stored = SafetensorsFile(path / f"{file}.safetensors")
            shapes = {key: tuple(stored.read(key).shape) for key in stored.entries}
            assert shapes == {"weight": (outputs, 384), "bias": (outputs,)}, name


def test_the_adapters_differ_in_type_rank_and_scale(configs: list[dict[str, object]]) -> None:
    lora = [config for config in configs if config["peft_type"] == "LORA"]
    assert len(configs) - len(lora) == 1
    assert {config["r"] for config in lora} == {8, 16, 32}
    assert any(config["lora_alpha"] != config["r"] for config in lora)
    assert any("fc1" in config["target_modules"] for config in lora)  # type: ignore[operator]
    assert {config["base_model_name_or_path"] for config in configs} == {HUB_ID}


def test_adapters_were_trained_until_they_compress(taskset: TaskSet) -> None:
    for name, path in taskset.own().items():
        scores = json.loads((path / "scores.json").read_text())
        config = json.loads((path / "adapter_config.json").read_text())
        if config["peft_type"] == "LORA":  # VeRA's rows are random ones, whatever is learnt
            assert scores["null_space"]["own"] < scores["null_space"]["random"] - 0.01, name


def test_scores_are_in_the_cards_and_above_the_probes_on_average(taskset: TaskSet) -> None:
    gains = []
    for name, task in taskset.tasks.items():
        folder = FOLDER / "adapters" / name
        test = json.loads((folder / "scores.json").read_text())["test"]
        assert f"{test['own']:.4f}" in (folder / "README.md").read_text(encoding="utf-8")
        ratio = test["own"] / test["probe"]
        gains.append(ratio if task.higher_is_better else 1 / ratio)
    assert np.mean(gains) > 1.05
