"""Scores the stored adapters and probes as ``coremerge evaluate`` does, and writes scores and cards beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from card import write_card
from PIL import Image
from ratios import own_ratios
from tasks import TASKS
from train import load_base

import coremerge
from coremerge.evaluation import Evaluator, TaskSet, read_taskset
from coremerge.evaluation.taskset import Split

SPLITS: tuple[Split, ...] = ("validation", "test")
PICTURES = 32
"""Unlabelled ones, for null-space ratios."""


def score_all(folder: Path, base: str, names: Sequence[str]) -> None:
    """Scores those tasks of ``tasks.yaml`` on validation and test rows."""
    taskset = read_taskset(folder).only(names)
    adapters = {name: coremerge.load(path) for name, path in taskset.own().items()}
    evaluator = Evaluator(taskset, adapters, base=base)
    own = {split: evaluator.own(split).raw for split in SPLITS}
    probes = Evaluator(_with_probes(taskset), {}, base=base)
    without = {split: probes.score({}, split).raw for split in SPLITS}
    model = load_base(base)
    for name, task in taskset.tasks.items():
        path = folder / "adapters" / name
        ratios = own_ratios(model, path, _pictures(folder / "data", TASKS[name].domain))
        scores = {
            "metric": task.metric,
            **{
                split: {
                    "rows": len(taskset.rows(name, split)),
                    "own": round(own[split][name], 4),
                    "probe": round(without[split][name], 4),
                }
                for split in SPLITS
            },
            "null_space": _null_space(ratios),
            "training": json.loads((path / "scores.json").read_text(encoding="utf-8"))["training"],
        }
        (path / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        write_card(path, TASKS[name], scores)
        print(name, scores["test"], scores["null_space"], flush=True)


def _with_probes(taskset: TaskSet) -> TaskSet:
    tasks = {
        name: task.model_copy(update={"head": f"adapters/{name}/probe.safetensors"})
        for name, task in taskset.tasks.items()
    }
    return taskset.model_copy(update={"tasks": tasks})


def _pictures(data: Path, domain: str) -> Any:
    paths = sorted((data / domain).glob("unlabelled-*.webp"))[:PICTURES]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def _null_space(ratios: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean over modules of the adapter's own ratios, that of the lowest block, and what random rows give."""
    blocks: dict[str, list[float]] = {}
    for name, (own, _) in ratios.items():
        blocks.setdefault(name.split(".")[2], []).append(own)
    return {
        "own": round(float(np.mean([own for own, _ in ratios.values()])), 4),
        "own_lowest_block": round(min(float(np.mean(block)) for block in blocks.values()), 4),
        "random": round(float(np.mean([random for _, random in ratios.values()])), 4),
    }
