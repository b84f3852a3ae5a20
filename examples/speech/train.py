"""Trains both adapters of this folder: python train.py [--only TASK] [--base DIR] [--data-only].

Minutes on one core. Writes data/ and adapters/ and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from card import write_card
from peft import LoraConfig, get_peft_model
from phrases import SIZES, TASKS, Phrase, draw
from speak import RATE, keep, speak
from torch import Tensor, nn
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from coremerge import load
from coremerge.evaluation import Evaluator, Scores, read_taskset
from coremerge.evaluation.taskset import Split

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import save_adapter

HERE = Path(__file__).parent
HUB_ID = "openai/whisper-tiny.en"
BATCH, WARMUP, LEARNING_RATE, SEED, IGNORED = 8, 20, 1e-3, 0, -100
STEPS = {"order": 200, "clock": 400}
SPLITS: tuple[Split, ...] = ("validation", "test")
SETTINGS = {
    "order": {"r": 16, "lora_alpha": 24, "target_modules": r".*decoder.*\.(q_proj|k_proj|v_proj|out_proj)"},
    "clock": {"r": 8, "lora_alpha": 16, "target_modules": r".*decoder.*\.(q_proj|v_proj|fc1|fc2)"},
}


class Heard(NamedTuple):
    """Phrases as the frozen encoder hears them."""

    states: Tensor
    """(phrases, 1500, 384)."""
    answers: list[str]


def write_data(task: str, sounds: dict[str, list[Any]], phrases: dict[str, list[Phrase]]) -> None:
    """One WAV file a phrase, and the rows."""
    folder = HERE / "data"
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    for split in ("unlabelled", "validation", "test"):
        rows = []
        for i, (sound, phrase) in enumerate(zip(sounds[split], phrases[split], strict=True)):
            name = f"sounds/{task}-{split}-{i:02}.wav"
            keep(sound, folder / name)
            rows.append({"audio": name} | ({} if split == "unlabelled" else {"answer": phrase.answer}))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}.{split}.jsonl").write_text(text, encoding="utf-8")


@torch.no_grad()
def hear(model: Any, processor: Any, sounds: Sequence[Any]) -> Tensor:
    """The encoder's states (sounds, 1500, 384): adapters are on the decoder alone, so once is enough."""
    found = []
    for i in range(0, len(sounds), BATCH):
        inputs = processor.feature_extractor(sounds[i : i + BATCH], sampling_rate=RATE, return_tensors="pt")
        found.append(model.model.encoder(inputs.input_features.to(model.dtype)).last_hidden_state)
    return torch.cat(found)


def labelled(tokenizer: Any, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The decoder's inputs and the tokens that follow (answers, length), those given before an answer ignored."""
    tokens = [tokenizer(text_target=answer).input_ids for answer in answers]
    given = next(
        i
        for i, pair in enumerate(zip(tokens[0], tokenizer(text_target="").input_ids, strict=False))
        if pair[0] != pair[1]
    )
    length = max(map(len, tokens))
    ids = torch.full((len(tokens), length), tokenizer.pad_token_id)
    labels = torch.full((len(tokens), length), IGNORED)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, given : len(row)] = torch.tensor(row[given:])
    return ids[:, :-1], labels[:, 1:]


def logits(model: Any, states: Tensor, ids: Tensor) -> Tensor:
    encoded = BaseModelOutput(last_hidden_state=states)
    return model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits.float()


def fit(model: Any, tokenizer: Any, heard: Heard, steps: int) -> None:
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    rng = random.Random(SEED)
    model.train()
    for step in range(steps):
        rows = rng.sample(range(len(heard.answers)), BATCH)
        ids, labels = labelled(tokenizer, [heard.answers[i] for i in rows])
        loss = nn.functional.cross_entropy(logits(model, heard.states[rows], ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 0:
            print(f"  {step}: {loss.item():.3f}", flush=True)
    model.eval()


def train(task: str, base: Path, tokenizer: Any, heard: Heard) -> None:
    """Trains a task's adapter and writes it."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_base(base), LoraConfig(**SETTINGS[task]), autocast_adapter_dtype=False)
    fit(model, tokenizer, heard, STEPS[task])
    save_adapter(model, HERE / "adapters" / task, HUB_ID)


def score(task: str, base: Path) -> None:
    """Scores the stored adapter as ``coremerge evaluate`` does, and writes the scores and its card beside it."""
    taskset, folder = read_taskset(HERE), HERE / "adapters" / task
    evaluator = Evaluator(taskset.only([task]), {task: load(folder)}, base=base)
    scores: dict[str, Any] = {"metric": "exact_match"}
    for split in SPLITS:
        scores[split] = {"rows": SIZES[split], "own": _said(evaluator.own(split), task)}
    scores["test"]["no_adapter"] = _said(evaluator.score({}, "test"), task)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    settings = {"type": "LoRA", **SETTINGS[task], "steps": STEPS[task], "batch": BATCH, "learning rate": LEARNING_RATE}
    write_card(folder, HUB_ID, taskset.tasks[task].description, settings, scores)
    print(task, json.dumps(scores), flush=True)


def _said(scores: Scores, task: str) -> dict[str, float]:
    return {"exact_match": round(scores.raw[task], 4), "log_likelihood": round(scores.log_likelihood[task], 3)}


def load_base(folder: Path, attention: str = "eager") -> Any:
    """The frozen base; plain attention has the quicker backward pass on a processor."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(TASKS), help="train this task alone")
    parser.add_argument("--base", type=Path, help="folder of the base model")
    parser.add_argument("--scores-only", action="store_true", help="train nothing, score what is there")
    parser.add_argument("--data-only", action="store_true", help="write sounds and rows, train nothing")
    arguments = parser.parse_args()
    phrases = {task: draw(task) for task in TASKS}
    sounds = {
        task: {split: list(map(speak, each)) for split, each in splits.items()} for task, splits in phrases.items()
    }
    for task in TASKS:
        write_data(task, sounds[task], phrases[task])
    if arguments.data_only:
        return
    folder = arguments.base or Path(read_taskset(HERE).base.locate())
    names = arguments.only or list(TASKS)
    if not arguments.scores_only:
        processor, base = AutoProcessor.from_pretrained(folder), load_base(folder, "sdpa")
        for task in names:
            states = hear(base, processor, sounds[task]["train"])
            answers = [phrase.answer for phrase in phrases[task]["train"]]
            train(task, folder, processor.tokenizer, Heard(states, answers))
    for task in names:
        score(task, folder)


if __name__ == "__main__":
    main()
