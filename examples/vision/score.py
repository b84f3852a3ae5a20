"""Scores the stored adapters and probes as ``coremerge evaluate`` does, and writes scores and cards beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from backbone import pixels
from card import write_card
from PIL import Image
from tasks import TASKS
from train import load_base

import coremerge
from coremerge.evaluation import Evaluator, TaskSet, read_taskset
from coremerge.evaluation.taskset import Split

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import mean_ratios, own_ratios

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
        pictures = _pictures(folder / "data", TASKS[name].domain)
        ratios = own_ratios(model, adapters[name], pictures)
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


def _pictures(data: Path, domain: str) -> list[dict[str, Any]]:
    """Batches of a domain's unlabelled ones."""
    paths = sorted((data / domain).glob("unlabelled-*.webp"))[:PICTURES]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return [{"pixel_values": pixels(images[i : i + 16]).float()} for i in range(0, len(images), 16)]


def _null_space(ratios: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean over modules of the adapter's own ratios, that of the lowest block, and what random rows give."""
    blocks: dict[str, list[float]] = {}
    for name, (own, _) in ratios.items():
        blocks.setdefault(name.split(".")[2], []).append(own)
    means, lowest = mean_ratios(ratios), min(float(np.mean(block)) for block in blocks.values())
    return {"own": means["own"], "own_lowest_block": round(lowest, 4), "random": means["random"]}
