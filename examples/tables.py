"""The tables of tasks in the READMEs of examples, from what is stored beside each adapter: python examples/tables.py.

Rewrites what stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coremerge.evaluation import TaskSet, read_taskset
from coremerge.evaluation.taskset import Task

HERE = Path(__file__).parent
FOLDERS = ("vision", "generation", "vlm", "speech")
METRICS = {
    "accuracy": "accuracy", "pearson": "Pearson's r", "r2": "R²", "iou": "IoU", "miou": "mean IoU",
    "angular_error": "angle in degrees",
    "exact_match": "exact match", "chrf": "chrF", "rouge_l": "ROUGE-L",
}  # fmt: skip
PARTS = re.compile(r"(\w+?)_?proj$")

Scores = Mapping[str, Any]
Row = Callable[[TaskSet, str, Task, Scores], list[str]]


def adapter_of(folder: Path) -> str:
    """Type, rank, alpha and modules, as its config has them."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = ", ".join(sorted({PARTS.sub(r"\1", name.split(".")[-1]) for name in listed(config["target_modules"])}))
    if config["peft_type"] != "LORA":
        return f"{config['peft_type'].replace('VERA', 'VeRA')}, r {config['r']}; {modules}"
    stabilised = ", rank-stabilised" if config.get("use_rslora") else ""
    return f"r {config['r']}, alpha {config['lora_alpha']}{stabilised}; {modules}"


def listed(targets: list[str] | str) -> list[str]:
    """The names of modules, also where they are a pattern's last choice."""
    return re.findall(r"\w+", targets.rpartition("(")[2]) if isinstance(targets, str) else targets


def answer_of(task: Task) -> str:
    """What a head predicts."""
    found = f"{len(task.classes)} classes" if task.classes else f"{task.outputs} value{'s' if task.outputs > 1 else ''}"
    return f"map of {found}" if task.per == "pixel" else found


def named(name: str, task: Task) -> str:
    return f"`{name}`: {task.description}"


def with_head(taskset: TaskSet, name: str, task: Task, scores: Scores) -> list[str]:
    """A task whose head has a probe beside it."""
    form = "{:.1f}°" if task.metric == "angular_error" else "{:.3f}"
    ratios = scores["null_space"]
    return [
        named(name, task),
        Path(str(task.unlabelled)).stem,
        answer_of(task),
        adapter_of(taskset.own()[name]),
        METRICS[task.metric],
        form.format(scores["test"]["own"]),
        form.format(scores["test"]["probe"]),
        f"{ratios['own']:.3f} / {ratios['random']:.3f}",
    ]


def answered(taskset: TaskSet, name: str, task: Task, scores: Scores) -> list[str]:
    """A task that a language model answers."""
    own, base = scores["test"]["own"], scores["test"]["no_adapter"]
    values = [f"{found[task.metric]:.3f}" for found in (own, base)]
    likely = [f"{found['log_likelihood']:.2f}" for found in (own, base)]
    return [named(name, task), METRICS[task.metric], adapter_of(taskset.own()[name]), *values, *likely]


def seen(taskset: TaskSet, name: str, task: Task, scores: Scores) -> list[str]:
    """A task that a vision-language model answers."""
    found = [f"{scores['test'][which]:.3f}" for which in ("own", "no_adapter")]
    ratios = " / ".join(f"{scores['null_space_ratio'][which]:.3f}" for which in ("own", "random"))
    return [named(name, task), METRICS[task.metric], adapter_of(taskset.own()[name]), *found, ratios]


def trained(taskset: TaskSet, name: str, task: Task, scores: Scores) -> list[str]:
    """How far its adapter is."""
    ratios = scores["null_space_ratio"]
    return [f"`{name}`", f"{scores['mean_frobenius_norm']:.2f}", f"{ratios['own']:.3f}", f"{ratios['random']:.3f}"]


TABLES: Mapping[str, tuple[str, Row]] = {
    "heads": ("task | pictures | kind | adapter | score | own | probe | ω / random", with_head),
    "answers": ("task | metric | adapter | own | base | log-likelihood, own | base", answered),
    "seen": ("task | metric | adapter | own | base | ω / random", seen),
    "training": ("task | mean norm | null-space ratio | of random rows", trained),
}
"""Name of the place in a README → heading, and a task's line."""


def table(taskset: TaskSet, heading: str, row: Row) -> str:
    lines = [heading.split(" | "), ["---"] * (heading.count("|") + 1)]
    for name, task in taskset.tasks.items():
        stored = taskset.own()[name] / "scores.json"
        lines.append(row(taskset, name, task, json.loads(stored.read_text(encoding="utf-8"))))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewrite(folder: Path) -> None:
    """The README of one example."""
    taskset, path = read_taskset(folder), folder / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, (heading, row) in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n\n", f"\n<!-- {name}: end -->"
        if begin in text:
            before, rest = text.split(begin, 1)
            text = before + begin + table(taskset, heading, row) + end + rest.split(end, 1)[1]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for given in sys.argv[1:] or [HERE / name for name in FOLDERS]:
        rewrite(Path(given))
