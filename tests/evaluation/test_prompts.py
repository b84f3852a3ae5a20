"""Rows of tasks that are answered with text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation.prompts import Question, read_questions
from coremerge.evaluation.taskset import TaskSet
from coremerge.learning.rows import Example, Message
from made import jsonl, picture
from speakers import sound

GENERATION = {"kind": "generation", "metric": "exact_match", "test": "rows.jsonl"}
CHOICE = {"kind": "choice", "metric": "accuracy", "test": "rows.jsonl", "choices": [" yes", " no"]}


def read(folder: Path, row: Any, **task: Any) -> Question:
    jsonl(folder / "rows.jsonl", row)
    taskset = TaskSet.model_validate({"folder": folder, "name": "t", "tasks": {"task": task}})
    (found,) = read_questions(taskset, "task", "test")
    return found


def test_a_template_is_filled_from_the_row(tmp_path: Path) -> None:
    prompt = 'JSON like {"a": 1} of {text} ({n}, {n}):'
    found = read(tmp_path, {"text": "a {b}", "n": 3, "answer": " x "}, **GENERATION, prompt=prompt)
    assert found == Question(Example('JSON like {"a": 1} of a {b} (3, 3):'), " x ")
    assert found.prompt.place.endswith("rows.jsonl, line 1")


def test_a_chat_is_a_turn_of_the_users(tmp_path: Path) -> None:
    row = {"text": "hello", "answer": "x"}
    found = read(tmp_path, row, **GENERATION, prompt="{text}!", chat=True)
    assert found.prompt.messages == (Message("user", "hello!"),)
    found = read(tmp_path, row, **GENERATION, prompt="{text}!", chat=True, system="")
    assert found.prompt.messages == (Message("system", ""), Message("user", "hello!"))


def test_messages_come_from_the_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = read(tmp_path, {"messages": turns, "answer": "x"}, **GENERATION, system="s")
    assert [turn.content for turn in found.prompt.messages or ()] == ["s", "a", "b", "c"]
    own = [{"role": "system", "content": "r"}, *turns]
    found = read(tmp_path, {"messages": own, "answer": "x"}, **GENERATION, system="s")
    assert [turn.content for turn in found.prompt.messages or ()] == ["r", "a", "b", "c"]
    with pytest.raises(ConfigError, match='messages = "b": a chat that ends with an answer'):
        read(tmp_path, {"messages": turns[:2], "answer": "x"}, **GENERATION)


def test_images_and_sounds_lie_beside_the_file(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    sound(tmp_path / "in/a.wav", 440)
    seen = read(tmp_path, {"image": "in/a.png", "answer": "x"}, **GENERATION, prompt="what?")
    assert (seen.prompt.text, seen.prompt.image) == ("what?", tmp_path / "in/a.png")
    asked = read(tmp_path, {"image": "in/a.png", "answer": "x"}, **GENERATION, prompt="what?", chat=True)
    assert asked.prompt.kind == "messages and image"
    heard = read(tmp_path, {"audio": "in/a.wav", "answer": "x"}, **GENERATION)
    assert heard.prompt == Example(audio=tmp_path / "in/a.wav")
    with pytest.raises(SourceError, match="no such sound"):
        read(tmp_path, {"audio": "in/b.wav", "answer": "x"}, **GENERATION)


def test_a_label_is_one_of_the_choices(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "a", "label": "no"}, **CHOICE, prompt="{text}?").answer == " no"
    with pytest.raises(ConfigError, match=r'label = "maybe": none of the choices. One of'):
        read(tmp_path, {"text": "a", "label": "maybe"}, **CHOICE, prompt="{text}?")


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ("no json", {"prompt": "a"}, "line 1.*no JSON object"),
        ([1], {"prompt": "a"}, "no JSON object"),
        ({"text": "a"}, {"prompt": "{text}"}, "answer = null: a text is needed"),
        ({"text": "a", "answer": " "}, {"prompt": "{text}"}, 'answer = " ": a text is needed'),
        ({"text": "a", "answer": True}, {"prompt": "{text}"}, "answer = true: a text is needed"),
        ({"text": "a", "answer": "b"}, {"prompt": "{word}"}, "word = null: the prompt asks for {word}. Its keys: text"),
        ({"text": "a", "answer": "b"}, {}, "prompt: no prompt. Give the task a prompt"),
        ({"audio": "a.wav", "answer": "b"}, {"prompt": "a"}, "a prompt beside a sound"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(tmp_path: Path, row: Any, task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, row, **GENERATION, **task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, "does not go with generation: take one of exact_match, chrf, rouge_l, log_likelihood"),
        ({"head": "h.safetensors"}, "head does not go with generation"),
        ({"classes": ["a", "b"]}, "classes does not go with generation"),
        ({"test": None}, "test is missing"),
        ({"system": "s", "prompt": "a"}, "add chat: true"),
        ({"choices": ["a", "b"]}, "choices goes with choice alone"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"kind": "choice", "metric": "accuracy"}, "choices, for all of its rows, are two different texts"),
        (
            {"kind": "choice", "metric": "accuracy", "choices": ["a", " a"]},
            "choices, for all of its rows, are two different texts",
        ),
        ({"kind": "regression", "metric": "mae", "prompt": "a"}, "prompt goes with generation, choice alone"),
    ],
)
def test_a_task_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSet.model_validate({"name": "t", "tasks": {"task": GENERATION | changes}})
