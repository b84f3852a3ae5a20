"""Makes all of this folder anew: python train.py --emoji DIR --names FILE [--only TASK] [--data-only] [--work DIR].

The projector first, if it is not there; then the adapters. Writes data/, projector.safetensors and adapters/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from adapters import SETTINGS, measure, train_adapter
from card import write_card
from projector import fresh_projector, train_projector
from rows import family_of, write_data
from tasks import TASKS
from world import Pictures, load_base, make_items, with_states

from coremerge.bases import make

HERE = Path(__file__).parent
PROJECTOR = HERE / "projector.safetensors"


def base(projector: Path) -> tuple[Any, Any]:
    return load_base(make("llava", projector=projector))


def prepare_projector(items: dict[str, Any], work: Path) -> None:
    """Trains it, unless it ships already."""
    if PROJECTOR.exists():
        return
    fresh_projector(work / "fresh.safetensors")
    model, processor = base(work / "fresh.safetensors")
    train_projector(model, processor, with_states(items, model, processor, work), PROJECTOR)


def make_adapter(task: str, family: dict[str, Pictures]) -> None:
    """Trains, writes and scores one adapter."""
    folder = HERE / "adapters" / task
    model, processor = base(PROJECTOR)
    seconds = train_adapter(task, model, processor, family, folder)
    scores = measure(task, base(PROJECTOR)[0], processor, family, folder)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_card(folder, TASKS[task], SETTINGS[task], scores)
    print(f"{task}: {seconds:.0f} s, {json.dumps(scores)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--emoji", type=Path, required=True, help="folder assets of npm's @lobehub/fluent-emoji-3d")
    parser.add_argument("--names", type=Path, required=True, help="Unicode's emoji-test.txt")
    parser.add_argument("--only", action="append", choices=list(TASKS), help="train this task alone")
    parser.add_argument("--data-only", action="store_true", help="write the rows and pictures, train nothing")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for what is computed on the way")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    items = make_items(arguments.emoji, arguments.names)
    write_data(items, HERE / "data")
    if arguments.data_only:
        return
    prepare_projector(items, arguments.work)
    model, processor = base(PROJECTOR)
    families = with_states(items, model, processor, arguments.work)
    for task in arguments.only or TASKS:
        make_adapter(task, families[family_of(task)])


if __name__ == "__main__":
    main()
