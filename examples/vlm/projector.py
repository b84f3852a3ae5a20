"""The projector between both frozen models: first towards the embeddings of words, then by captions.

Words cost seconds: each patch is to look like the embedding of a word that says what is in its cell. Captions, through
the whole frozen language model, do the rest. No task's question is among them: answers are for adapters to learn.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packing import Packer, answer_logits, answer_loss, embed
from safetensors.torch import save_file
from tasks import Turn
from torch import Tensor, nn
from world import Pictures

LAYER, SIDE, PATCHES = 9, 84, 36
STEPS, SCENES, EMOJI, RATE = 320, 6, 4, 5e-4
WORD_EPOCHS, WORD_BATCH, WORD_RATE, COMMON = 7, 64, 2e-3, 100
"""Words that are there oftener than the last number are told from each other."""
Family = dict[str, Pictures]


def save_projector(projector: nn.Module, path: Path) -> None:
    """As :func:`coremerge.bases.llava.build` takes it, in half precision."""
    tensors = {key: value.detach().half().contiguous() for key, value in projector.state_dict().items()}
    save_file(tensors, path, {"format": "pt", "layer": str(LAYER), "side": str(SIDE)})


def fresh_projector(path: Path) -> None:
    """Random weights, to build a base with."""
    torch.manual_seed(0)
    linear_1, linear_2 = nn.Linear(384, 576), nn.Linear(576, 576)
    save_projector(nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2}), path)


def train_projector(model: Any, processor: Any, families: dict[str, Family], path: Path) -> None:
    """Trains both stages and writes the projector; what was measured on the way is printed."""
    torch.manual_seed(0)
    projector = model.model.multi_modal_projector.float()
    projector.requires_grad_(True)
    packer = Packer(processor.tokenizer, PATCHES)
    _towards_words(model, projector, packer, [family["train"] for family in families.values()])
    save_projector(projector, path)
    print("words:", json.dumps(held_out(model, projector, packer, families)), flush=True)
    _by_captions(model, projector, packer, families, path)
    save_projector(projector, path)


def _towards_words(model: Any, projector: nn.Module, packer: Packer, parts: list[Pictures]) -> None:
    """Each patch towards its word's embedding, and nearer to it than to the other common words."""
    embeddings = model.get_input_embeddings().weight.float()
    all_words = [word for part in parts for item in part.items for cell in item.cells for word in cell]
    commonest = [word for word, count in Counter(all_words).most_common() if count > COMMON]
    words = commonest + sorted(set(all_words) - set(commonest))
    vectors = torch.stack([embeddings[list(packer.encode(f" {word}"))].mean(0) for word in words])
    index = {word: i for i, word in enumerate(words)}
    states = torch.cat([part.states for part in parts])
    meant = torch.tensor([index[word] for word in all_words]).view(-1, 3, 3, 2, 2).transpose(2, 3).reshape(-1, 36)
    _standardise(projector, states)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=WORD_RATE, weight_decay=0.01)
    per_epoch = len(states) // WORD_BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, WORD_RATE, total_steps=WORD_EPOCHS * per_epoch + 1)
    scale, start, near = vectors.var(), time.perf_counter(), vectors[: len(commonest)]
    for step in range(WORD_EPOCHS * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(states))
        rows = order[step % per_epoch * WORD_BATCH :][:WORD_BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(states[rows]).float().flatten(0, 1)
        targets = meant[rows].flatten()
        apart = nn.functional.mse_loss(made, vectors[targets]) / scale
        known = targets < len(near)
        closeness = 2 * made[known] @ near.T - near.square().sum(1)
        wrong = nn.functional.cross_entropy(closeness, targets[known])
        optimizer.zero_grad()
        (apart + wrong).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            right = (closeness.argmax(-1) == targets[known])[targets[known] > 0].float().mean().item()
            seconds = time.perf_counter() - start
            print(
                f"words {step + 1}: {apart.item():.3f} of the variance, {right:.3f} right, {seconds:.0f} s", flush=True
            )


@torch.no_grad()
def _standardise(projector: Any, states: Tensor) -> None:
    """The first layer's inputs have mean 0 and variance 1 then, whatever the tower's scale."""
    mean, std = states.float().mean((0, 1)), states.float().std((0, 1))
    projector.linear_1.weight.copy_(torch.randn_like(projector.linear_1.weight) / len(mean) ** 0.5 / std)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)


def _batches(families: dict[str, Family]) -> Iterator[list[tuple[Pictures, list[int], list[list[Turn]]]]]:
    """Scenes with their captions, then emoji with theirs."""
    counts = {"scenes": SCENES, "emoji": EMOJI}
    orders: dict[str, list[int]] = {name: [] for name in counts}
    while True:
        batch = []
        for name, count in counts.items():
            part = families[name]["train"]
            if len(orders[name]) < count:
                orders[name] = torch.randperm(len(part.items)).tolist()
            rows, orders[name] = orders[name][:count], orders[name][count:]
            batch.append((part, rows, [[part.items[row].caption] for row in rows]))
        yield batch


def _by_captions(model: Any, projector: nn.Module, packer: Packer, families: dict[str, Family], path: Path) -> None:
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS + 1, pct_start=0.06)
    start, seen = time.perf_counter(), []
    for step, batch in zip(range(STEPS), _batches(families), strict=False):
        optimizer.zero_grad()
        losses = []
        for part, rows, turns in batch:
            packed = packer(turns)
            loss = answer_loss(
                answer_logits(model, packed, embed(model, packed, projector(part.states[rows].float()))), packed
            )
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(losses)
        if step % 10 == 9:
            mean = torch.tensor(seen[-10:]).mean(0)
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: scenes {mean[0]:.3f}, emoji {mean[1]:.3f}, {seconds:.0f} s", flush=True)
        if step % 100 == 99:
            save_projector(projector, path)
            print(f"step {step + 1}:", json.dumps(held_out(model, projector, packer, families)), flush=True)


@torch.no_grad()
def held_out(
    model: Any, projector: nn.Module, packer: Packer, families: dict[str, Family], rows: int = 12
) -> dict[str, dict[str, float]]:
    """Family → the loss of captions of validation items with their own pictures, and with each other's."""
    found: dict[str, dict[str, float]] = {}
    for name, family in families.items():
        part = family["validation"]
        own = projector(part.states[:rows].float())
        packed = packer([[item.caption] for item in part.items[:rows]])
        both = {"own": own, "shuffled": own.roll(1, 0)}
        found[name] = {
            which: round(answer_loss(answer_logits(model, packed, embed(model, packed, images)), packed).item(), 3)
            for which, images in both.items()
        }
    return found
