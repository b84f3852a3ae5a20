"""Trains every adapter of this folder: python train.py [--only TASK] [--base DIR] [--wordnet DIR] [--data-only].

Five to ten minutes a task on one core. Writes data/ and adapters/ and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tasks
import torch
from card import write_card
from measuring import measure
from peft import get_peft_model
from prompting import Prompter, Question, answer_logits, collate
from settings import BATCH, SETTINGS, WARMUP, Setting
from splits import Splits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from coremerge.evaluation import TaskSet, read_taskset

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import save_adapter

HERE = Path(__file__).parent
SEED, CLIP = 0, 1.0


class Trainer:
    """AdamW on copies in single precision of an adapter that the model itself holds in bfloat16."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.held = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.exact = [nn.Parameter(parameter.detach().float()) for parameter in self.held]
        self.optimizer = torch.optim.AdamW(self.exact, lr=setting.rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / setting.steps)) / 2,
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for held, exact in zip(self.held, self.exact, strict=True):
            exact.grad, held.grad = None if held.grad is None else held.grad.float(), None
        nn.utils.clip_grad_norm_(self.exact, CLIP)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for held, exact in zip(self.held, self.exact, strict=True):
                held.copy_(exact)


def batches(lengths: list[int], steps: int) -> Iterator[list[int]]:
    """Random batches of similar lengths, over as many epochs as it takes: sorted within chunks of 16 batches."""
    for epoch in range(steps):
        rng = random.Random(epoch)
        order = rng.sample(range(len(lengths)), len(lengths))
        size = 16 * BATCH
        chunks = [sorted(order[i : i + size], key=lengths.__getitem__) for i in range(0, len(order), size)]
        found = [chunk[i : i + BATCH] for chunk in chunks for i in range(0, len(chunk), BATCH)]
        rng.shuffle(found)
        yield from found


def fit(
    model: Any, questions: list[Question], setting: Setting, pad: int, watch: Callable[[int], bool] | None = None
) -> None:
    """``watch`` is given the number of steps done, 0 first, and says whether to go on."""
    trainer = Trainer(model, setting)
    model.train()
    order = batches([question.length for question in questions], setting.steps)
    for done, indices in zip(range(setting.steps), order, strict=False):
        if watch and not watch(done):
            return
        logits, tokens, _ = answer_logits(model, collate([questions[i] for i in indices], pad))
        loss = nn.functional.cross_entropy(logits, tokens)
        trainer.step(loss)
        if done % 50 == 0 or done == setting.steps - 1:
            print(f"  {done}: {loss.item():.3f}", flush=True)
    if watch:
        watch(setting.steps)
    model.eval()


def base_model(folder: str) -> Any:
    """The frozen base in bfloat16 with plain attention, whose backward pass is the quick one on a processor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    return model.requires_grad_(False).eval()


def train(taskset: TaskSet, name: str, splits: Splits, base: str) -> None:
    """Trains one task's adapter and writes it in half precision."""
    torch.manual_seed(SEED)
    setting, folder = SETTINGS[name], taskset.own()[name]
    prompter = Prompter(AutoTokenizer.from_pretrained(base), taskset.tasks[name])
    questions = [prompter.question(fields) for fields in splits["train"]]
    model = get_peft_model(base_model(base), setting.config(), autocast_adapter_dtype=False)
    start = time.perf_counter()
    fit(model, questions, setting, prompter.tokenizer.pad_token_id)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    save_adapter(model, folder, taskset.base.hub_id)


def score(taskset: TaskSet, name: str, splits: Splits, base: str) -> None:
    """Scores the stored adapter, and writes the scores and its card beside it."""
    task, folder = taskset.tasks[name], taskset.own()[name]
    scores = measure(taskset, name, base, Prompter(AutoTokenizer.from_pretrained(base), task), splits)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    described = SETTINGS[name].described(len(splits["train"]))
    write_card(folder, taskset.base.hub_id, task.description, described, scores)
    print(f"{name}: {json.dumps(scores)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", help="train this task alone")
    parser.add_argument("--base", type=Path, help="folder of the base model")
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun and so on"
    )
    parser.add_argument("--data-only", action="store_true", help="write the rows, train nothing")
    parser.add_argument("--scores-only", action="store_true", help="train nothing, score what is there")
    arguments = parser.parse_args()
    taskset, made = read_taskset(HERE), tasks.make(arguments.wordnet)
    for name, splits in made.items():
        tasks.write(HERE / "data", name, splits, Prompter(None, taskset.tasks[name]).unlabelled)
    if arguments.data_only:
        return
    base = str(arguments.base or taskset.base.locate())
    for name in arguments.only or SETTINGS:
        if not arguments.scores_only:
            train(taskset, name, made[name], base)
        score(taskset, name, made[name], base)


if __name__ == "__main__":
    main()
