"""The rows and pictures that ship: data/TASK.SPLIT.jsonl and data/FAMILY/SPLIT-NUMBER.webp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks import SPLITS, TASKS, Item

METRICS = {"emoji_name": "chrf", "scene_caption": "chrf"}
"""Of the tasks whose metric is not exact match."""

MOST_TOKENS = {"emoji_name": 16, "scene_caption": 24}
"""Of an answer; elsewhere 6."""


def family_of(task: str) -> str:
    return "emoji" if task.startswith("emoji") else "scenes"


def write_data(items: dict[str, dict[str, list[Item]]], folder: Path) -> None:
    """Writes every split but the training one."""
    for family, splits in items.items():
        (folder / family).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            for i, item in enumerate(splits[split]):
                (folder / _picture(family, split, i)).write_bytes(item.webp)
    for task in TASKS:
        for split in SPLITS:
            rows = [_row(task, split, i, item) for i, item in enumerate(items[family_of(task)][split])]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{task}.{split}.jsonl").write_text(text, encoding="utf-8")


def _picture(family: str, split: str, i: int) -> str:
    return f"{family}/{split}-{i:03d}.webp"


def _row(task: str, split: str, i: int, item: Item) -> dict[str, Any]:
    """Of inputs without a label: the chat by itself, as ``coremerge fit`` reads it."""
    question, answer = item.turns[task]
    picture = {"image": _picture(family_of(task), split, i)}
    if split == "unlabelled":
        return picture | {"messages": [{"role": "user", "content": question}]}
    return picture | {"question": question, "answer": answer}
