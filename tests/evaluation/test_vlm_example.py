"""What ships of the small vision-language model is whole, and small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from coremerge.evaluation import TaskSet, read_taskset
from coremerge.evaluation.prompts import read_questions
from coremerge.formats import load
from coremerge.learning.examples import read_examples

FOLDER = Path(__file__).parents[2] / "examples" / "vlm"
LEFT_OUT = {"__pycache__", "work"}


@pytest.fixture(scope="module")
def taskset() -> TaskSet:
    return read_taskset(FOLDER)


def test_it_stays_small() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file() and not LEFT_OUT & set(file.parts)]
    assert sum(file.stat().st_size for file in files) < 6e6


def test_every_row_has_its_picture_a_question_and_an_answer(taskset: TaskSet) -> None:
    for name in taskset.tasks:
        validation, test = (read_questions(taskset, name, split) for split in ("validation", "test"))
        assert (len(validation), len(test)) == (100, 200)
        assert not {row.prompt.image for row in validation} & {row.prompt.image for row in test}
        unlabelled = read_examples(FOLDER / "data" / f"{name}.unlabelled.jsonl", count=64)
        assert (len(unlabelled), {row.kind for row in unlabelled}) == (64, {"messages and image"})


def test_pictures_are_six_patches_a_side() -> None:
    pictures = sorted(FOLDER.glob("data/*/*.webp"))
    assert len(pictures) == 2 * 364
    for file in pictures:
        with Image.open(file) as picture:
            assert picture.size == (84, 84)


def test_the_projector_is_there(taskset: TaskSet) -> None:
    assert taskset.base is not None and taskset.base.projector == "projector.safetensors"
    assert (FOLDER / "projector.safetensors").stat().st_size < 2e6


def test_every_task_has_its_adapter_and_learns_something(taskset: TaskSet) -> None:
    for folder in taskset.own().values():
        assert all("language_model" in module for module in load(folder))
        scores = json.loads((folder / "scores.json").read_text())["test"]
        assert scores["own"] > scores["no_adapter"]
        assert f"{scores['own']:.3f}" in (folder / "README.md").read_text()
