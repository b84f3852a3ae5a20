"""The generation example is whole: every task has its rows, its adapter and its scores, and prompts collide as said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from coremerge.evaluation import read_taskset
from coremerge.evaluation.prompts import read_questions
from coremerge.evaluation.taskset import Split
from coremerge.formats import load

FOLDER = Path(__file__).parents[2] / "examples" / "generation"
TASKS = yaml.safe_load((FOLDER / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]
SCORED: tuple[Split, ...] = ("validation", "test")
SPLITS = {"unlabelled": 64, "validation": 100, "test": 300}


def rows(task: str, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{task}.{split}.jsonl").read_text().splitlines()]


def asked(task: str, split: str) -> set[str]:
    """The prompts of a split, as they stand."""
    if split == "unlabelled":
        return {_said(row) for row in rows(task, split)}
    return {TASKS[task]["prompt"].format(**row) for row in rows(task, split)}


def _said(row: dict[str, object]) -> str:
    messages = row.get("messages")
    return str(messages[-1]["content"] if isinstance(messages, list) else row["text"])


def test_it_has_thirteen_tasks_and_stays_small() -> None:
    kinds = [task["kind"] for task in TASKS.values()]
    assert (kinds.count("generation"), kinds.count("choice")) == (7, 6)
    shipped = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in shipped) < 18e6


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_are_questions_of_their_task(task: str) -> None:
    taskset = read_taskset(FOLDER)
    for split in SCORED:
        assert len(read_questions(taskset, task, split)) == SPLITS[split]


@pytest.mark.parametrize("task", TASKS)
def test_each_split_has_its_rows_and_no_prompt_is_in_two(task: str) -> None:
    prompts = {split: asked(task, split) for split in SPLITS}
    assert {split: len(found) for split, found in prompts.items()} == SPLITS
    assert len(set.union(*prompts.values())) == sum(SPLITS.values())


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task]["kind"] == "choice"])
def test_labels_are_choices_and_each_is_as_frequent(task: str) -> None:
    choices = TASKS[task]["choices"]
    labels = [row["label"] for row in rows(task, "test")]
    counts = [labels.count(choice) for choice in choices]
    assert sum(counts) == len(labels)
    assert max(counts) - min(counts) <= (11 if task == "verb_topic" else 1)  # WordNet has 28 short ones of feelings


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_has_its_tokens(task: str) -> None:
    if TASKS[task]["kind"] == "generation":
        longest = max(len(str(row["answer"])) for row in rows(task, "test"))
        assert 0 < longest < 5 * TASKS[task]["max_new_tokens"]


def test_two_tasks_have_one_prompt_and_no_test_row_of_one_is_asked_before_the_test_of_another() -> None:
    assert all(TASKS["slots"][key] == TASKS["to_json"][key] for key in ("prompt", "chat", "system"))
    for a, b in (("slots", "to_json"), ("category", "part_of_speech"), ("category", "chain")):
        assert not asked(a, "test") & (asked(b, "validation") | asked(b, "unlabelled"))


def test_the_adapters_differ_in_rank_scale_and_modules() -> None:
    configs = {task: json.loads((FOLDER / "adapters" / task / "adapter_config.json").read_text()) for task in TASKS}
    assert len({config["r"] for config in configs.values()}) >= 2
    assert len({config["lora_alpha"] for config in configs.values()}) >= 3
    assert len({tuple(config["target_modules"]) for config in configs.values()}) >= 3
    assert {config["base_model_name_or_path"] for config in configs.values()} == {"HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_is_read_has_a_card_and_beats_the_base(task: str) -> None:
    folder = FOLDER / "adapters" / task
    scores = json.loads((folder / "scores.json").read_text())
    assert len(load(folder)) >= 20
    own, without = scores["test"]["own"], scores["test"]["no_adapter"]
    assert task == "gloss" or own[scores["metric"]] > without[scores["metric"]]  # that one's README says why
    assert own["log_likelihood"] > without["log_likelihood"]
    assert f"{own[scores['metric']]:.4f}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_has_turned_to_its_inputs(task: str) -> None:
    """NSC has nothing to go by where an adapter misses no less of its inputs than random rows would."""
    scores = json.loads((FOLDER / "adapters" / task / "scores.json").read_text())
    assert scores["null_space_ratio"]["own"] < scores["null_space_ratio"]["random"] - 0.003
