"""Makes all of this folder anew: python train.py --emoji DIR --names FILE [--only TASK] [--data-only] [--work DIR].

The projector first, if it is not there; then the adapters. Writes data/, projector.safetensors and adapters/.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import SETTINGS, TRAINING, train_adapter
from card import write_card
from lower import LowerStates
from packing import Packer
from projector import PATCHES, Family, fresh_projector, train_projector
from rows import METRICS, family_of, write_data
from tasks import SPLITS, TASKS
from world import load_base, make_items, with_states

from coremerge import load
from coremerge.bases import make
from coremerge.evaluation import Evaluator, read_taskset
from coremerge.evaluation.unlabelled import read_unlabelled

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import mean_ratios, own_ratios

HERE = Path(__file__).parent
PROJECTOR = HERE / "projector.safetensors"
RATIO_ROWS = 32
"""Unlabelled inputs that null-space ratios are measured on."""


def base(projector: Path) -> tuple[Any, Any]:
    return load_base(make("llava", projector=projector))


def prepare_projector(items: dict[str, Any], work: Path) -> None:
    """Trains it, unless it ships already."""
    if PROJECTOR.exists():
        return
    fresh_projector(work / "fresh.safetensors")
    model, processor = base(work / "fresh.safetensors")
    train_projector(model, processor, with_states(items, model, processor, work), PROJECTOR)


def lower_states(family: Family, split: str, count: int | None = None) -> LowerStates:
    """Of the first items of a split."""
    model, processor = base(PROJECTOR)
    part = family[split]
    with torch.no_grad():
        images = model.model.multi_modal_projector(part.states[:count].to(model.dtype))
    return LowerStates(model, Packer(processor.tokenizer, PATCHES), part.items[:count], images)


def make_adapter(task: str, lower: LowerStates) -> None:
    """Trains and writes one adapter."""
    folder = HERE / "adapters" / task
    folder.mkdir(parents=True, exist_ok=True)
    seconds = train_adapter(task, base(PROJECTOR)[0], lower, folder)
    print(f"{task}: {seconds:.0f} s", flush=True)


def score(task: str) -> None:
    """Scores the stored adapter, and writes the scores and its card beside it."""
    scores, folder = measure(task), HERE / "adapters" / task
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_card(folder, TASKS[task], SETTINGS[task], scores)
    print(f"{task}: {json.dumps(scores)}", flush=True)


def measure(task: str) -> dict[str, Any]:
    """The stored adapter's scores and the base model's, as ``coremerge evaluate`` has them, and its ratio."""
    taskset = read_taskset(HERE)
    adapter = load(taskset.own()[task])
    evaluator = Evaluator(taskset.only([task]), {task: adapter})
    scores: dict[str, Any] = {"metric": METRICS.get(task, "exact_match")}
    for split in ("validation", "test"):
        own, without = (found.raw[task] for found in (evaluator.own(split), evaluator.score({}, split)))
        scores[split] = {"rows": SPLITS[split], "own": round(own, 4), "no_adapter": round(without, 4)}
    inputs = read_unlabelled(taskset, task)[:RATIO_ROWS]
    batches = [batch for _, batch in evaluator.encoder.placed(inputs, 8)]
    return scores | {"null_space_ratio": mean_ratios(own_ratios(evaluator.encoder.model, adapter, batches))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--emoji", type=Path, required=True, help="folder assets of npm's @lobehub/fluent-emoji-3d")
    parser.add_argument("--names", type=Path, required=True, help="Unicode's emoji-test.txt")
    parser.add_argument("--only", action="append", choices=list(TASKS), help="train this task alone")
    parser.add_argument("--data-only", action="store_true", help="write the rows and pictures, train nothing")
    parser.add_argument("--scores-only", action="store_true", help="train nothing, score what is there")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for what is computed on the way")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    items = make_items(arguments.emoji, arguments.names)
    write_data(items, HERE / "data")
    if arguments.data_only:
        return
    if not arguments.scores_only:
        train(items, arguments.only or list(TASKS), arguments.work)
    for task in arguments.only or TASKS:
        score(task)


def train(items: dict[str, Any], names: list[str], work: Path) -> None:
    """The projector, if it is not there, then adapters."""
    prepare_projector(items, work)
    model, processor = base(PROJECTOR)
    families = with_states(items, model, processor, work)
    lower = {name: lower_states(family, "train", TRAINING[name]) for name, family in families.items()}
    for task in names:
        make_adapter(task, lower[family_of(task)])


if __name__ == "__main__":
    main()
