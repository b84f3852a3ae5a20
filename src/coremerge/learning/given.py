"""Adapters and batches as they are handed in: whether they are what they should be, and what is done to any batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, InputError
from coremerge.learning.backbone import Batch, sides_apart

TENSORS = ("input_ids", "attention_mask", "pixel_values", "inputs_embeds", "decoder_input_ids")
"""What must be a tensor, if it is there."""

GIVE = 'Give what a tokenizer or processor makes with return_tensors="pt": {"input_ids": tensor, ...}'


def check_adapters(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> None:
    """Whether they are loaded adapters.

    Raises:
        InputError: there are none, or something else is among them.
    """
    many = isinstance(adapters, (Mapping, Sequence)) and not isinstance(adapters, (Adapter, str, bytes))
    if not many:
        kind, remedy = type(adapters).__name__, "Give a mapping: {name: coremerge.load(PATH), ...}"
        raise InputError(f"adapters by name are needed, not one {kind}", key="adapters", remedy=remedy)
    if not adapters:
        raise InputError("no adapters given", key="adapters", remedy="Name at least one")
    named = adapters.items() if isinstance(adapters, Mapping) else enumerate(adapters)
    for name, adapter in named:
        if not isinstance(adapter, Adapter):
            raise InputError(
                f"an adapter is needed, not a {type(adapter).__name__}", key=f"adapters.{name}",
                remedy="Load it: coremerge.load(PATH)",
            )  # fmt: skip


def check_data(data: object) -> None:
    """Whether they are batches by the task's name, as far as can be seen without going through them.

    Raises:
        ConfigError: they are not.
    """
    if not isinstance(data, Mapping):
        remedy = "Give a mapping: {name: [batch, ...], ...}"
        raise ConfigError(f"batches by task are needed, not a {type(data).__name__}", key="data", remedy=remedy)


def listed(batches: Iterable[Batch], task: str) -> list[Batch]:
    """A task's batches.

    Raises:
        InputError: there are none, or they are not what a model takes.
    """
    if isinstance(batches, (Mapping, str, bytes)) or not isinstance(batches, Iterable):
        kind = "one batch" if isinstance(batches, Mapping) else f"a {type(batches).__name__}"
        raise InputError(f"a list of batches is needed, not {kind}", key=f"data.{task}", remedy="Give [batch, ...]")
    found = list(batches)
    if not found:
        raise InputError("no inputs", key=task, remedy="Give at least one batch")
    for i, batch in enumerate(found):
        _check_batch(batch, f"data.{task}[{i}]")
    return [sides_apart(batch) for batch in found]


def _check_batch(batch: Any, key: str) -> None:
    if not isinstance(batch, Mapping):
        raise InputError(f"a batch is a mapping, not a {type(batch).__name__}", key=key, remedy=GIVE)
    for name in TENSORS:
        if not isinstance(batch.get(name), Tensor | None):
            kind = type(batch[name]).__name__
            raise InputError(f"a tensor is needed, not a {kind}", key=f"{key}.{name}", remedy=GIVE)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if not tensors or not all(value.ndim for value in tensors) or not len(tensors[0]):
        raise InputError("a batch without inputs", key=key, remedy=GIVE)


def moved(batch: Batch, device: torch.device | None) -> Batch:
    """``batch`` where the model takes it."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def rows_of(batch: Batch) -> int:
    """Inputs of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def first_row(batch: Batch) -> Batch:
    """The batch with one input, where its tensors are all of as many rows."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if any(len(value) != rows_of(batch) for value in tensors.values()):
        return batch
    return {key: value[:1] if key in tensors else value for key, value in batch.items()}
