"""Trains one task's adapter, writes it in half precision, and scores what was written."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lower import FIRST, LowerStates
from packing import answer_logits, answer_loss
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import save_adapter

BASE = "llava-dinov2-small-smollm2-135m"


LAYERS = range(FIRST, 30)
BATCH, WARMUP = 10, 5
TRAINING = {"scenes": 300, "emoji": 400}
"""Pictures that adapters are trained on, the first ones."""


@dataclass(frozen=True)
class Setting:
    """How one adapter is made."""

    r: int
    alpha: int
    rate: float
    steps: int = 120
    modules: tuple[str, ...] = ("q_proj", "v_proj")

    def config(self) -> LoraConfig:
        names = [f"model.language_model.layers.{i}.self_attn.{module}" for i in LAYERS for module in self.modules]
        return LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=names, task_type="CAUSAL_LM")


SETTINGS = {
    "colour": Setting(8, 16, 1e-3),
    "shape": Setting(4, 8, 1e-3, modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    "position": Setting(8, 16, 1e-3),
    "size": Setting(8, 16, 1e-3),
    "count": Setting(8, 16, 1e-3),
    "scene_caption": Setting(8, 16, 1e-3),
    "emoji_kind": Setting(8, 8, 1e-3),
    "emoji_name": Setting(8, 16, 1e-3),
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


def train_adapter(task: str, model: Any, lower: LowerStates, folder: Path) -> float:
    """Trains on what the lower half made of training items and writes PEFT's two files.

    Args:
        task: its name.
        model: the base; the adapter stays in it.
        lower: of training items.
        folder: to write into.

    Returns:
        Seconds.
    """
    torch.manual_seed(0)
    setting = SETTINGS[task]
    peft = get_peft_model(model, setting.config(), autocast_adapter_dtype=False)
    llava, masters = peft.base_model.model, Masters(peft, setting.rate, setting.steps)
    start, seen, order = time.perf_counter(), [], []
    for step in range(setting.steps):
        if len(order) < BATCH:
            order = torch.randperm(len(lower.items)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        packed, states = lower.batch(task, rows)
        loss = answer_loss(answer_logits(llava, packed, states, FIRST), packed)
        loss.backward()
        masters.step()
        seen.append(loss.item())
        if step % 10 == 9:
            print(f"{task} {step + 1}: {sum(seen[-10:]) / 10:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    save_adapter(peft, folder, BASE)
    return time.perf_counter() - start
