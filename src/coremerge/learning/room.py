"""How much room the hidden states of a fit take, before any are there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor

from coremerge.learning.backbone import Batch
from coremerge.learning.given import rows_of
from coremerge.learning.stream import TAIL
from coremerge.plan import Plan

SPILL_BYTES = 1 << 30
"""Hidden states that are expected to take more go to disk, unless it is said where."""

WIDTH, IMAGE_TOKENS = 1024, 256
"""Of a hidden state, and in an image, where a model does not say."""


def state_bytes(config: Any, plan: Plan, batches: Sequence[Batch], itemsize: int = 4) -> int:
    """What is kept at once, about; a part of it where the prior alone is asked for.

    Of both ways through the model, the outputs of the last :data:`~coremerge.learning.stream.TAIL` blocks; and what the
    modules of a block should give: for each token that counts as many numbers as their adapters' ranks add up to.

    Args:
        config: the model's, as ``transformers`` has it; anything else: one of usual sizes is assumed.
        plan: the adapters.
        batches: all inputs.
        itemsize: bytes of one of the model's numbers.
    """
    wide = sum(tokens * width for batch in batches for tokens, width in _kept(config, batch))
    goals = _goals(plan) * sum(_counting(config, batch) for batch in batches)
    return 2 * TAIL * wide * itemsize + goals * max(itemsize, 4)


def _goals(plan: Plan) -> int:
    """Numbers a token, of the block that has most."""
    blocks: dict[str, int] = {}
    for name, planned in plan.modules.items():
        block = re.match(r"(.*?\.)?\d+(?=\.)", name)
        key = block[0] if block else name
        blocks[key] = blocks.get(key, 0) + min(planned.module.shape[0], sum(planned.ranks.values()))
    return max(blocks.values(), default=0)


def _kept(config: Any, batch: Batch) -> Iterator[tuple[int, int]]:
    """Tokens and width of each stack that a batch runs through."""
    text, images = _texts(batch), _patches(config, batch)
    if text or not images:
        yield text or rows_of(batch), _width(getattr(config, "text_config", config))
    if images:
        yield images, _width(getattr(config, "vision_config", config))


def _counting(config: Any, batch: Batch) -> int:
    mask = batch.get("attention_mask")
    texts = int(mask.sum()) if isinstance(mask, Tensor) and mask.ndim == 2 else _texts(batch)
    return max(texts, _patches(config, batch)) or rows_of(batch)


def _texts(batch: Batch) -> int:
    """Tokens, with those that are padding."""
    ids, embedded = batch.get("input_ids"), batch.get("inputs_embeds")
    return ids.numel() if isinstance(ids, Tensor) else prod(embedded.shape[:-1]) if isinstance(embedded, Tensor) else 0


def _patches(config: Any, batch: Batch) -> int:
    """Of all images, and a token for each."""
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return 0
    if pixels.ndim == 2:  # cut up already, as Qwen's are
        return len(pixels)
    vision = getattr(config, "vision_config", config)
    sides = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    known = all(isinstance(side, int) and side > 0 for side in sides)
    each = (sides[0] // sides[1]) ** 2 + 1 if known else IMAGE_TOKENS  # type: ignore[operator]
    return prod(pixels.shape[:-3]) * each


def _width(config: Any) -> int:
    named = (getattr(config, key, None) for key in ("hidden_size", "d_model"))
    return next((value for value in named if isinstance(value, int)), WIDTH)
