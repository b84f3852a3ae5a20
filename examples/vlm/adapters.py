"""Trains one task's adapter, writes it in half precision, and scores what was written."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from packing import Packer, answer_logits, answer_loss
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import Item, Turn
from torch import Tensor, nn
from vision import pixels, tower_states
from world import Pictures

BASE = "llava-dinov2-small-smollm2-135m"
FAMILY = {"emoji_name": "emoji", "emoji_kind": "emoji"}
"""Of the tasks that are not about scenes."""

LAYERS = range(6, 30)
BATCH, WARMUP, MOST_TURNS = 8, 8, 3


@dataclass(frozen=True)
class Setting:
    """How one adapter is made.

    Attributes:
        vision: also on the vision tower's queries and values; its states are computed anew at every step then.
    """

    r: int
    alpha: int
    rate: float
    steps: int = 100
    vision: bool = False
    modules: tuple[str, ...] = ("q_proj", "v_proj")

    def config(self) -> LoraConfig:
        names = [f"model.language_model.layers.{i}.self_attn.{module}" for i in LAYERS for module in self.modules]
        if self.vision:
            names += [
                f"model.vision_tower.encoder.layer.{i}.attention.{m}" for i in range(9) for m in ("q_proj", "v_proj")
            ]
        return LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=names, task_type="CAUSAL_LM")


SETTINGS = {
    "emoji_name": Setting(8, 16, 6e-4, vision=True),
    "emoji_kind": Setting(4, 8, 1e-3),
    "scene_caption": Setting(4, 8, 1e-3),
    "colour": Setting(4, 8, 1e-3),
    "shape": Setting(4, 4, 1e-3),
    "position": Setting(4, 8, 1e-3),
    "count": Setting(4, 16, 8e-4, vision=True),
    "relation": Setting(4, 8, 1e-3),
}


class Masters:
    """AdamW on copies in single precision of parameters that the model keeps in bfloat16."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.copies = [nn.Parameter(parameter.detach().float()) for parameter in self.own]
        self.optimizer = torch.optim.AdamW(self.copies, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        )

    def step(self) -> None:
        for copy, parameter in zip(self.copies, self.own, strict=True):
            copy.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.own, strict=True):
                parameter.copy_(copy)


def image_tokens(model: Any, part: Pictures, rows: Sequence[int], processor: Any, vision: bool) -> Tensor:
    """What the projector gives for these items, (rows, 36, 576)."""
    if vision:
        states = tower_states(model, pixels([part.items[row] for row in rows], processor))
    else:
        states = part.states[list(rows)].to(model.dtype)
    tokens: Tensor = model.model.multi_modal_projector(states)
    return tokens


def train_adapter(task: str, model: Any, processor: Any, family: dict[str, Pictures], folder: Path) -> None:
    """Trains on the family's training items and writes PEFT's two files; the model is left with the adapter in it."""
    torch.manual_seed(0)
    setting = SETTINGS[task]
    peft = get_peft_model(model, setting.config(), autocast_adapter_dtype=False)
    llava = peft.base_model.model
    masters, packer = Masters(peft, setting.rate, setting.steps), Packer(processor.tokenizer, 36)
    part, start, seen = family["train"], time.perf_counter(), []
    order: list[int] = []
    for step in range(setting.steps):
        if len(order) < BATCH:
            order = torch.randperm(len(part.items)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        packed = packer([part.items[row].turns[task][:MOST_TURNS] for row in rows])
        loss = answer_loss(
            answer_logits(llava, packed, image_tokens(llava, part, rows, processor, setting.vision)), packed
        )
        loss.backward()
        masters.step()
        seen.append(loss.item())
        if step % 10 == 9:
            print(f"{task} {step + 1}: {sum(seen[-10:]) / 10:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    save_adapter(peft, folder)


def save_adapter(peft: Any, folder: Path) -> None:
    peft.peft_config["default"].base_model_name_or_path = BASE
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = folder / "adapter_model.safetensors"
    save_file({key: value.half().contiguous() for key, value in load_file(weights).items()}, weights, {"format": "pt"})


@torch.no_grad()
def exact_match(model: Any, processor: Any, task: str, part: Pictures, vision: bool, batch: int = 16) -> float:
    """The share of items whose shipped question is answered word for word, greedily: one pass with the answer given."""
    packer, right = Packer(processor.tokenizer, 36), 0.0
    for at in range(0, len(part.items), batch):
        rows = list(range(at, min(at + batch, len(part.items))))
        packed = packer([[part.items[row].turns[task][0]] for row in rows])
        logits = answer_logits(model, packed, image_tokens(model, part, rows, processor, vision))
        wrong = (logits.argmax(-1) != packed.targets).float()
        right += float((torch.zeros(len(rows)).index_add(0, packed.turn, wrong) == 0).sum())
    return right / len(part.items)
