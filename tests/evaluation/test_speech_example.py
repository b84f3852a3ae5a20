"""The speech example is whole: sounds that Whisper takes, one set of sentences a split, adapters on the decoder."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest
import yaml

from coremerge.evaluation import read_taskset
from coremerge.evaluation.prompts import read_questions
from coremerge.evaluation.taskset import Split
from coremerge.evaluation.unlabelled import read_unlabelled
from coremerge.formats import load

FOLDER = Path(__file__).parents[2] / "examples" / "speech"
TASKS = yaml.safe_load((FOLDER / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]
SCORED: dict[Split, int] = {"validation": 24, "test": 48}


def test_it_stays_small() -> None:
    shipped = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in shipped) < 9e6


@pytest.mark.parametrize("task", TASKS)
def test_every_row_has_its_own_sound(task: str) -> None:
    taskset = read_taskset(FOLDER)
    prompts = [read_questions(taskset, task, split) for split in SCORED]
    assert [len(each) for each in prompts] == list(SCORED.values())
    heard = [str(one.prompt.audio) for each in prompts for one in each]
    heard += [str(one.audio) for one in read_unlabelled(taskset, task)]
    assert len(heard) == len(set(heard)) == 96
    for path in heard:
        with wave.open(path) as file:
            assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
            assert file.getnframes() < 4 * 16_000


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_is_on_the_decoder_and_beats_the_base(task: str) -> None:
    folder = FOLDER / "adapters" / task
    adapter, scores = load(folder), json.loads((folder / "scores.json").read_text())
    assert adapter and all(".decoder." in f".{name}" for name in adapter)
    own, without = scores["test"]["own"], scores["test"]["no_adapter"]
    assert own["exact_match"] > 0.75 > without["exact_match"]
    assert own["log_likelihood"] > without["log_likelihood"]
    assert f"{own['exact_match']:.4f}" in (folder / "README.md").read_text()
