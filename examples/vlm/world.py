"""What training needs: the pictures with their states, and the base model, each made once in a work folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tasks import Item, emoji_items, scene_items
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vision import all_states

TRAINING_SCENES, PAINTINGS = 1500, 3
"""Scenes to train on, and pictures of each emoji."""

ALL = ("unlabelled", "validation", "test", "train")


@dataclass(frozen=True)
class Pictures:
    """Items of one family and split, and what the frozen tower makes of them: (items, 36, 384), bfloat16."""

    items: Sequence[Item]
    states: Tensor


def load_base(folder: Path) -> tuple[Any, Any]:
    """The base model in bfloat16 with nothing to train, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval().requires_grad_(False), AutoProcessor.from_pretrained(folder)


def make_items(assets: Path, names: Path) -> dict[str, dict[str, list[Item]]]:
    """Family → split → items."""
    return {"emoji": emoji_items(assets, names, PAINTINGS), "scenes": scene_items(TRAINING_SCENES)}


def with_states(
    items: dict[str, dict[str, list[Item]]], model: Any, processor: Any, work: Path
) -> dict[str, dict[str, Pictures]]:
    """Family → split → pictures; the states are kept in the work folder."""
    found: dict[str, dict[str, Pictures]] = {}
    for family, splits in items.items():
        file = work / f"{family}.safetensors"
        if not file.exists():
            save_file({split: all_states(model, splits[split], processor) for split in ALL}, file)
        states = load_file(file)
        found[family] = {split: Pictures(splits[split], states[split]) for split in ALL}
    return found
