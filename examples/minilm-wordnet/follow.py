"""Trains adapters of this folder anew, and lets somebody watch: benchmarks/accuracy/compression.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tasks
import torch
from encoder import Encoder
from peft import get_peft_model
from train import HERE, SEED, SETTINGS, Split, Targets, cut, fit
from wordnet import WordNet

from coremerge.evaluation import read_taskset

TASKS = tuple(SETTINGS)
SOURCE = Path("/usr/share/wordnet")
"""Where the rows come from, if nothing is said."""

INPUTS = 64
Watch = Callable[[int, Any, Sequence[Any], Callable[[], float]], bool]
"""Steps done, the model, batches of inputs without labels, and what scores the model on other rows → go on."""


@cache
def _prepared(source: Path) -> tuple[Any, Encoder]:
    taskset = read_taskset(HERE)
    return cut(WordNet(source), tasks.TASKS), Encoder(taskset.base.locate(), taskset.max_length)


def follow(name: str, watch: Watch, source: Path) -> None:
    """Trains one task's adapter as ``train.py`` does; the score is accuracy, or Pearson's correlation."""
    torch.manual_seed(SEED)
    made, encoder = _prepared(source)
    splits, setting = made[name], SETTINGS[name]
    labels = Targets(splits)
    model, head = get_peft_model(encoder.fresh(), setting.config), torch.nn.Linear(encoder.width, labels.outputs)
    held, scored = splits["validation"][:INPUTS], splits["validation"][INPUTS:]
    train, test = (
        Split(encoder.rows([(e.text, e.pair) for e in rows]), labels.encode([e.label for e in rows]))
        for rows in (splits["train"], scored)
    )
    tokens = encoder.rows([(e.text, e.pair) for e in held]).tokens
    inputs = [encoder.tokenizer.pad(tokens[i : i + 16], return_tensors="pt").data for i in range(0, INPUTS, 16)]

    @torch.no_grad()
    def score() -> float:
        return labels.score(head(encoder.all_features(model, test.rows)), test.targets)

    def watched(step: int) -> bool:
        goes_on = watch(step, model, inputs, score)
        model.train()
        return goes_on

    fit(encoder, model, head, train, labels, rate=setting.learning_rate, watch=watched)
