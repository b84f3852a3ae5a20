"""Trains one task's adapter and head on the frozen base, and the probe beside them."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbone import Backbone, pixels
from heads import Targets, features, probe
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from pictures import Table, as_map, shipped_table
from tasks import Setting, Task
from torch import Tensor, nn
from transformers import Dinov2Model

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import save_adapter, save_half

HUB_ID = "facebook/dinov2-small"
SEED, PROBE_PICTURES = 0, 1500


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        images: that are seen, all epochs together.
        down: learning rate of LoRA's A, and of VeRA's inner vector.
        up: of LoRA's B, and of VeRA's outer vector.
        head: of the head, which begins as the probe.
        start: factor on the random A at the beginning: the smaller, the sooner A is what was learnt.
        decay: weight decay of A.
    """

    images: int = 3200
    batch: int = 16
    down: float = 2e-3
    up: float = 2e-3
    head: float = 1e-3
    start: float = 0.1
    decay: float = 0.0
    warmup: int = 20

    @classmethod
    def of(cls, task: Task, images: int = 3200) -> Schedule:
        """VeRA's vectors, of which there are few, learn faster; classes begin well and are soon lost at such rates."""
        if task.setting.vera:
            return cls(images, down=1e-2, up=1e-2, start=1.0)
        return cls(images, up=4e-4) if task.classes and not task.pixels else cls(images)


def configuration(setting: Setting) -> LoraConfig | VeraConfig:
    modules = list(setting.modules)
    if setting.vera:
        return VeraConfig(r=setting.r, target_modules=modules, vera_dropout=0.0, save_projection=True, d_initial=0.1)
    return LoraConfig(r=setting.r, lora_alpha=setting.alpha, target_modules=modules, lora_dropout=0.0)


def load_base(source: str | Path) -> Dinov2Model:
    model: Dinov2Model = Dinov2Model.from_pretrained(source, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def tokens_of(backbone: Backbone, images: NDArray[np.uint8], batch: int = 50) -> Tensor:
    """Tokens (n, 65, 384) of pictures."""
    return torch.cat([backbone(pixels(images[i : i + batch])) for i in range(0, len(images), batch)])


@dataclass
class Prepared:
    """What a task is trained with."""

    task: Task
    targets: Targets
    images: NDArray[np.uint8]
    labels: Tensor
    validation: tuple[NDArray[np.uint8], Tensor]


def prepare(folder: Path, name: str, task: Task, table: Table) -> Prepared:
    labels = [as_map(value) for value in table[task.key]] if task.pixels else table[task.key]
    targets = Targets(task, labels)
    images, shipped = shipped_table(folder, name, "validation")
    return Prepared(task, targets, table["image"], targets.encode(labels), (images, targets.encode(shipped)))


class Frozen:
    """Tokens of the base without adapters: of some of each domain's training pictures, and of its validation ones."""

    def __init__(self, base: Dinov2Model) -> None:
        self.backbone = Backbone(base)
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def features(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Of the training and of the validation pictures."""
        domain = prepared.task.domain
        if domain not in self._held:
            pictures = (prepared.images[:PROBE_PICTURES], prepared.validation[0])
            self._held[domain] = tuple(tokens_of(self.backbone, part).half() for part in pictures)  # type: ignore[assignment]
        train, validation = (features(prepared.task, tokens.float()) for tokens in self._held[domain])
        return train, validation


def fit(
    model: PeftModel,
    base: Dinov2Model,
    head: nn.Linear,
    prepared: Prepared,
    schedule: Schedule,
    *,
    watch: Callable[[int], bool] | None = None,
) -> list[float]:
    """AdamW, rates warmed up and then falling as a cosine; returns the losses.

    ``watch`` is given the number of steps done, 0 first, and says whether to go on.
    """
    backbone, task = Backbone(base, model), prepared.task
    groups = _groups(model, schedule)
    optimizer = torch.optim.AdamW([*groups, {"params": head.parameters(), "lr": schedule.head, "weight_decay": 0.0}])
    steps = schedule.images // schedule.batch
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / schedule.warmup) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    order = _order(len(prepared.images), steps * schedule.batch)
    losses: list[float] = []
    for step in range(steps):
        if watch and not watch(step):
            return losses
        places = order[step * schedule.batch : (step + 1) * schedule.batch]
        tokens = backbone(pixels(prepared.images[places]))
        loss = prepared.targets.loss(head(features(task, tokens)), prepared.labels[places])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        rate.step()
        losses.append(float(loss))
    if watch:
        watch(steps)
    return losses


def _order(count: int, wanted: int) -> NDArray[np.int64]:
    random = np.random.default_rng(SEED)
    return np.concatenate([random.permutation(count) for _ in range(wanted // count + 1)])[:wanted]


def _groups(model: PeftModel, schedule: Schedule) -> list[dict[str, Any]]:
    down = [p for name, p in model.named_parameters() if p.requires_grad and ("lora_A" in name or "lambda_d" in name)]
    up = [p for name, p in model.named_parameters() if p.requires_grad and ("lora_B" in name or "lambda_b" in name)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(schedule.start)
    return [
        {"params": down, "lr": schedule.down, "weight_decay": schedule.decay},
        {"params": up, "lr": schedule.up, "weight_decay": 0.0},
    ]


def train(base: Dinov2Model, frozen: Frozen, prepared: Prepared, schedule: Schedule, out: Path) -> None:
    """Trains the adapter, and writes it with its head and the probe, in half precision."""
    torch.manual_seed(SEED)
    begun = time.perf_counter()
    known, unseen = frozen.features(prepared)
    first = probe(prepared.targets, (known, prepared.labels[: len(known)]), (unseen, prepared.validation[1]))
    model = get_peft_model(copy.deepcopy(base), configuration(prepared.task.setting))
    head = copy.deepcopy(first).requires_grad_(True)
    losses = fit(model, base, head, prepared, schedule)
    save(model, prepared.targets.in_units(head), prepared.targets.in_units(first), out)
    with torch.no_grad():
        tokens = tokens_of(Backbone(base, model), prepared.validation[0])
        own = prepared.targets.agreement(head(features(prepared.task, tokens)), prepared.validation[1])
        without = prepared.targets.agreement(first(unseen), prepared.validation[1])
    (out / "scores.json").write_text(
        json.dumps(
            {
                "training": {
                    "images": schedule.images,
                    "seconds": round(time.perf_counter() - begun),
                    "loss": _tenths(losses),
                }
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    print(
        f"{out.name}: {own:.4f}, probe {without:.4f}; {time.perf_counter() - begun:.0f} s", _tenths(losses), flush=True
    )


def _tenths(losses: list[float]) -> list[float]:
    """Means over a tenth of the steps each."""
    return [round(float(part.mean()), 4) for part in np.array_split(np.array(losses), 10)]


def save(model: PeftModel, head: dict[str, Tensor], probe_: dict[str, Tensor], out: Path) -> None:
    """Writes PEFT's own files, the head and the probe, all tensors in half precision."""
    save_adapter(model, out, HUB_ID)
    save_half(head, out / "head.safetensors")
    save_half(probe_, out / "probe.safetensors")
    (out / "README.md").unlink(missing_ok=True)  # PEFT's own; the card takes its place
