"""The model card beside each adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters import BATCH, LAYERS, Setting

CARD = """\
---
library_name: peft
license: mit
language: en
tags:
- lora
- llava
---

# {name}

{description} An adapter on the small LLaVA of this example: DINOv2 ViT-S/14, a projector, SmolLM2-135M-Instruct.
Trained by `train.py` of this example, not with anybody's data: scenes drawn by `scenes.py`, emoji renders under MIT.

| setting | value |
|---|---|
| type | LoRA |
| r | {r} |
| alpha | {alpha} |
| modules | {modules} |
| steps | {steps} of {batch} pictures |
| optimiser | AdamW, linear to zero |
| learning rate | {rate:g} |

Stored in half precision; the scores are of the stored files, in bfloat16. On its own inputs, while it is active, its
down-projections miss a share of {own:.4f} of their inputs (the null-space ratio); random rows would miss {random:.4f}.

| split | rows | {metric}, with this adapter | {metric}, the base model |
|---|---|---|---|
{scores}
"""


def write_card(folder: Path, description: str, setting: Setting, scores: dict[str, Any]) -> None:
    """Writes the folder's README.md: the task, how the adapter was trained and what it scores."""
    layers = f"layers {LAYERS.start} to {LAYERS.stop - 1} of the language model"
    text = CARD.format(
        name=folder.name,
        description=description,
        r=setting.r,
        alpha=setting.alpha,
        modules=f"{', '.join(setting.modules)} of {layers}",
        steps=setting.steps,
        batch=BATCH,
        rate=setting.rate,
        metric=scores["metric"].replace("_", " "),
        own=scores["null_space_ratio"]["own"],
        random=scores["null_space_ratio"]["random"],
        scores="\n".join(
            f"| {split} | {scores[split]['rows']} | {scores[split]['own']:.3f} | {scores[split]['no_adapter']:.3f} |"
            for split in ("validation", "test")
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
