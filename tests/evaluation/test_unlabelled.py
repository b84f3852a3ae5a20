"""Inputs without labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coremerge.errors import SourceError
from coremerge.evaluation.taskset import Base, Task, TaskSet, read_taskset
from coremerge.evaluation.unlabelled import read_unlabelled
from coremerge.learning.rows import Message


def answered(folder: Path, **keys: str) -> TaskSet:
    rows = [{"word": "go", "answer": "went"}, {"word": "see", "answer": "saw"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = Task(
        kind="generation", metric="exact_match", prompt="Past of {word}", chat=True,
        validation="rows.jsonl", test="rows.jsonl", **keys,
    )  # fmt: skip
    return TaskSet(folder=folder, name="words", base=Base(path="base"), tasks={"past": task})


def test_they_are_those_of_the_validation_rows(folder: Path) -> None:
    taskset = read_taskset(folder)
    for name in taskset.tasks:
        assert read_unlabelled(taskset, name) == [row.example for row in taskset.rows(name, "validation")]


def test_of_answers_they_are_the_prompts(tmp_path: Path) -> None:
    found = [example.messages for example in read_unlabelled(answered(tmp_path), "past")]
    assert found == [(Message("user", "Past of go"),), (Message("user", "Past of see"),)]


def test_they_are_those_of_a_file_of_their_own(tmp_path: Path) -> None:
    taskset = answered(tmp_path, unlabelled="more.jsonl")
    with pytest.raises(SourceError, match=r"more\.jsonl"):
        read_unlabelled(taskset, "past")
    (tmp_path / "more.jsonl").write_text('{"text": "one"}\n{"text": "two", "answer": "2"}\n', encoding="utf-8")
    assert [example.text for example in read_unlabelled(taskset, "past")] == ["one", "two"]
