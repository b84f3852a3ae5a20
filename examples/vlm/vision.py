"""Pictures through the frozen vision tower, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tasks import Item
from torch import Tensor

BATCH = 48


def pixels(items: Sequence[Item], processor: Any) -> Tensor:
    """As the tower takes them, (items, 3, 84, 84)."""
    pictures = torch.from_numpy(np.stack([item.picture for item in items])).permute(0, 3, 1, 2).float() / 255
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    return (pictures - mean) / std


def tower_states(model: Any, values: Tensor) -> Tensor:
    """What the projector reads: the patches' states at its layer, (batch, 36, 384)."""
    out = model.model.vision_tower(values.to(model.dtype), output_hidden_states=True)
    states: Tensor = out.hidden_states[model.config.vision_feature_layer][:, 1:]
    return states


@torch.no_grad()
def all_states(model: Any, items: Sequence[Item], processor: Any) -> Tensor:
    """:func:`tower_states` of every item."""
    return torch.cat(
        [tower_states(model, pixels(items[i : i + BATCH], processor)) for i in range(0, len(items), BATCH)]
    )
