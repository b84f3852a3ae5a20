"""Trains adapters of this folder anew, and lets somebody watch: benchmarks/accuracy/compression.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone import Backbone, pixels
from domains import TRAINING, Domains
from heads import features, probe
from make import HERE, located
from packages import Packages
from peft import get_peft_model
from pictures import training_table
from PIL import Image
from tasks import TASKS as ALL
from train import SEED, Frozen, Schedule, configuration, fit, load_base, prepare, tokens_of

TASKS = ("category", "fashion", "animal", "position", "light", "count", "depth", "mask")
SOURCE = Path("packages")
"""Where the packages' files are, if nothing is said."""

INPUTS = 64
Watch = Callable[[int, Any, Sequence[Any], Callable[[], float]], bool]
"""Steps done, the model, batches of inputs without labels, and what scores the model on other rows → go on."""


def follow(name: str, watch: Watch, source: Path) -> None:
    """Trains one task's adapter as ``train.py`` does; the score is of the head as it is then, on validation rows."""
    torch.manual_seed(SEED)
    task, base = ALL[name], load_base(located())
    table = training_table(Domains(Packages(source)), task.domain, TRAINING[task.domain], HERE / "work")
    prepared = prepare(HERE, name, task, table)
    known, unseen = Frozen(base).features(prepared)
    first = probe(prepared.targets, (known, prepared.labels[: len(known)]), (unseen, prepared.validation[1]))
    model, head = get_peft_model(copy.deepcopy(base), configuration(task.setting)), copy.deepcopy(first)
    head.requires_grad_(True)
    backbone, inputs = Backbone(base, model), unlabelled(task.domain)

    @torch.no_grad()
    def score() -> float:
        tokens = tokens_of(backbone, prepared.validation[0])
        return prepared.targets.agreement(head(features(task, tokens)), prepared.validation[1])

    fit(model, base, head, prepared, Schedule.of(task), watch=lambda step: watch(step, model, inputs, score))


def unlabelled(domain: str) -> list[dict[str, torch.Tensor]]:
    """Batches of a domain's inputs without labels."""
    lines = (HERE / "data" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()[:INPUTS]
    files = [HERE / "data" / json.loads(line)["image"] for line in lines]
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return [{"pixel_values": pixels(pictures[i : i + 16]).float()} for i in range(0, len(pictures), 16)]
