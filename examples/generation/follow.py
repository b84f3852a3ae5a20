"""Trains adapters of this folder anew, and lets somebody watch: benchmarks/accuracy/compression.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tasks
import torch
from peft import get_peft_model
from prompting import Prompter, Question, answer_logits, collate
from settings import SETTINGS
from train import HERE, SEED, base_model, fit
from transformers import AutoTokenizer

from coremerge.evaluation import read_taskset

TASKS = ("past_tense", "iso_date", "slots", "category", "part_of_speech", "is_a")
SOURCE = Path("/usr/share/wordnet")
"""Where WordNet is, if nothing is said."""

INPUTS, TOGETHER = 64, 20
Watch = Callable[[int, Any, Sequence[Any], Callable[[], float]], bool]
"""Steps done, the model, batches of inputs without labels, and what scores the model on other rows → go on."""


def follow(name: str, watch: Watch, source: Path) -> None:
    """Trains one task's adapter as ``train.py`` does; the score is the share of validation answers that are right to
    the last token, greedily."""
    torch.manual_seed(SEED)
    taskset, splits = read_taskset(HERE), tasks.make(source)[name]
    base, setting = str(taskset.base.locate()), SETTINGS[name]
    prompter = Prompter(AutoTokenizer.from_pretrained(base), taskset.tasks[name])
    pad = prompter.tokenizer.pad_token_id
    model = get_peft_model(base_model(base), setting.config(), autocast_adapter_dtype=False)
    train, test = ([prompter.question(fields) for fields in splits[split]] for split in ("train", "validation"))
    prompts = [Question(prompter.question(fields).prompt, []) for fields in splits["unlabelled"][:INPUTS]]
    batches = [collate(prompts[i : i + 16], pad) for i in range(0, INPUTS, 16)]
    inputs = [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches]

    def watched(step: int) -> bool:
        goes_on = watch(step, model, inputs, lambda: right(model, test, pad))
        model.train()
        return goes_on

    fit(model, train, setting, pad, watched)


@torch.no_grad()
def right(model: Any, questions: Sequence[Question], pad: int) -> float:
    """The share of answers that greedy decoding would give: one pass with them given."""
    model.eval()
    found = 0
    for i in range(0, len(questions), TOGETHER):
        logits, tokens, counts = answer_logits(model, collate(questions[i : i + TOGETHER], pad))
        found += sum(bool(part.all()) for part in (logits.argmax(-1) == tokens).split(counts))
    return found / len(questions)
