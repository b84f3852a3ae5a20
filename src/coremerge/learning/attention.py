"""Attention as plain matrix products, where a processor's backward pass through the fused kernel is the slower one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.learning.backbone import Batch

SHORT = 256
"""Tokens. Of four Llama layers (9 heads, width 576) in bfloat16 on an Intel Xeon, one thread, 2026-11-30, forward and
backward took plain attention .88, .78, .74, .78 and 1.02 of the fused kernel's time at 32, 64, 128, 256 and 512
tokens; in float32 .98 to 1.00, then 1.11."""

PATCH = 14
"""Pixels that a token of an image has on a side, or more, in most models."""

SOUNDS = ("input_features", "input_values")
"""What models call them: of many more tokens than a text."""

FUSED, PLAIN = "sdpa", "eager"
"""What ``transformers`` calls both."""


def are_short(batches: Iterable[Batch]) -> bool:
    """Whether all inputs are texts or images of at most :data:`SHORT` tokens."""
    return all(_tokens(batch) <= SHORT for batch in batches)


def _tokens(batch: Batch) -> int:
    texts = [batch[key] for key in ("input_ids", "decoder_input_ids") if isinstance(batch.get(key), Tensor)]
    images = [batch["pixel_values"]] if isinstance(batch.get("pixel_values"), Tensor) else []
    sounds = [key for key in SOUNDS if key in batch]  # Whisper's come with the decoder's first tokens
    if sounds or (not texts and not images):
        return SHORT + 1
    counts = [int(ids.shape[-1]) for ids in texts]
    counts += [image.shape[-2] * image.shape[-1] // PATCH**2 if image.ndim >= 4 else SHORT + 1 for image in images]
    return max(counts)


@contextmanager
def plain_attention(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """``model`` with plain attention, if all of it runs in bfloat16 on a processor and has the fused kernel; as it was
    afterwards.
    """
    configs = {id(c): c for c in (getattr(part, "config", None) for part in model.modules()) if c is not None}.values()
    kinds = {getattr(config, "_attn_implementation", None) for config in configs}
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    switch: Any = getattr(model, "set_attn_implementation", None)
    on_processor = {p.device.type for p in parameters} == {"cpu"}
    narrow = autocast == torch.bfloat16 or {p.dtype for p in parameters} == {torch.bfloat16}
    if switch is None or kinds != {FUSED} or not on_processor or not narrow:
        yield
        return
    switch(PLAIN)
    try:
        yield
    finally:
        switch(FUSED)
