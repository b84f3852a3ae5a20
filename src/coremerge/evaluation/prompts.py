"""Rows of tasks that are answered with text: what goes in, and the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coremerge.errors import ConfigError
from coremerge.evaluation.taskset import Split, Task, TaskSet
from coremerge.learning.chats import awaits
from coremerge.learning.examples import check_files
from coremerge.learning.rows import Example, Message, read_messages, read_path


class Question(NamedTuple):
    """One row.

    Attributes:
        prompt: what the model is given.
        answer: what it should say; of a choice, the right one.
    """

    prompt: Example
    answer: str


_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
"""A field of the row in a template; all other braces stand for themselves."""


def read_questions(taskset: TaskSet, name: str, split: Split, limit: int | None = None) -> list[Question]:
    """The rows of a split, the first ``limit`` of them.

    A row is a JSON object with the fields of the task's ``prompt``, or ``messages``; an ``image`` or, without a prompt,
    ``audio``; and ``answer`` (``label``, where the answer is one of some choices).

    Raises:
        SourceError: the file is missing, or an image or a sound that a row names.
        ConfigError: a line is not a row of this task.
    """
    path, lines = taskset.lines(name, split, limit)
    task = taskset.tasks[name]
    return [_question(line, task, place, path.parent) for line, place in lines]


def _question(line: str, task: Task, place: str, folder: Path) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ConfigError("no JSON object", file=place, value=line, remedy="Give one row a line")
    prompt = _prompt(row, task, place, folder)
    check_files(prompt)
    return Question(prompt, _answer(row, task, place))


def _answer(row: Mapping[str, Any], task: Task, place: str) -> str:
    key = "label" if task.choices else "answer"
    found = row.get(key)
    if not isinstance(found, (str, int, float)) or isinstance(found, bool) or not str(found).strip():
        remedy = f"A row of this kind has its answer under {key}; its keys: {', '.join(map(str, row)) or 'none'}"
        raise ConfigError("a text is needed", file=place, key=key, value=found, remedy=remedy)
    if not task.choices:
        return str(found)
    for choice in task.choices:
        if choice.strip() == str(found).strip():
            return choice
    raise ConfigError("none of the choices", file=place, key=key, value=found, remedy=f"One of {list(task.choices)}")


def _prompt(row: Mapping[str, Any], task: Task, place: str, folder: Path) -> Example:
    image, audio = (
        read_path(row[key], key, place, folder) if row.get(key) is not None else None for key in ("image", "audio")
    )
    if task.prompt is None and "messages" in row:
        return Example(messages=_chat(row, task, place), image=image, place=place)
    if task.prompt is None and audio is not None:
        return Example(audio=audio, place=place)
    if task.prompt is None or audio is not None:
        raise ConfigError(
            "no prompt" if task.prompt is None else "a prompt beside a sound", file=place, key="prompt",
            remedy="Give the task a prompt with {fields} of its rows, or the rows messages or audio",
        )  # fmt: skip
    text = _filled(task.prompt, row, place)
    if task.chat:
        return Example(messages=(*_system(task), Message("user", text)), image=image, place=place)
    return Example(text, image=image, place=place)


def _chat(row: Mapping[str, Any], task: Task, place: str) -> tuple[Message, ...]:
    turns = read_messages(row["messages"], place)
    turns = turns if any(turn.role in ("system", "developer") for turn in turns) else (*_system(task), *turns)
    if not awaits(turns):
        raise ConfigError(
            "a chat that ends with an answer", file=place, key="messages", value=turns[-1].content,
            remedy="End it with the question, and put the answer under its own key",
        )  # fmt: skip
    return turns


def _system(task: Task) -> list[Message]:
    return [] if task.system is None else [Message("system", task.system)]


def _filled(template: str, row: Mapping[str, Any], place: str) -> str:
    def value(found: re.Match[str]) -> str:
        if not isinstance(row.get(found[1]), (str, int, float)):
            raise ConfigError(
                f"the prompt asks for {found[0]}", file=place, key=found[1], value=row.get(found[1]),
                remedy=f"Its keys: {', '.join(map(str, row)) or 'none'}",
            )  # fmt: skip
        return str(row[found[1]])

    return _FIELD.sub(value, template)
