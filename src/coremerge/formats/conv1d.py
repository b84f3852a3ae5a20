"""Which of a base model's weights are stored as (in, out): transformers' ``Conv1D``, of GPT-2 and its relatives.

The layout is the base's. An adapter's ``fan_in_fan_out`` is only a hint: PEFT corrects it while it wraps the first
adapter of a model, leaves it false in further ones, and stores the factors alike under either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coremerge.formats.safetensors_file import Entry

_FAMILIES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
"""The model types of transformers 5.23 whose classes have such layers."""
_LAYERS = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
"""What they are called there; all other layers of those models are plain."""


class Layouts:
    """Tells the layout of two-dimensional weights.

    Args:
        entries: all tensors of the base.
        config: its ``config.json``.
        hint: the adapter's ``fan_in_fan_out``.
    """

    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any], hint: bool) -> None:
        self._entries = entries
        self._types = frozenset(_model_types(config))
        self._hint = hint
        self._beside: dict[str, set[bool]] = {}
        for key in entries:
            turned = self._by_bias(key)
            if turned is not None:
                self._beside.setdefault(_parent(key), set()).add(turned)

    def is_turned(self, key: str, update: tuple[int, int]) -> bool:
        """Whether ``key``, which takes an ``update`` of that shape (out, in), is stored as (in, out).

        By the first that knows: the length of its bias (nothing, if it is square), the model type, the biases of the
        layers beside it, the hint. That counts where the shape bears it out, and for a square weight only where the
        model is unknown: PEFT itself corrects a wrong flag.
        """
        own = self._by_bias(key)
        if own is not None:
            return own
        if self._types & _FAMILIES:
            return _parent(key, 1).rpartition(".")[2] in _LAYERS
        beside = self._beside.get(_parent(key), set())
        if len(beside) == 1:
            return True in beside
        out, inner = update
        return self._hint and (not self._types if out == inner else self._entries[key].shape == (inner, out))

    def _by_bias(self, key: str) -> bool | None:
        """What its bias says of a weight that is not square: it is as long as there are outputs."""
        shape = self._entries[key].shape
        if not key.endswith("weight") or len(shape) != 2 or shape[0] == shape[1]:
            return None
        bias = self._entries.get(key.removesuffix("weight") + "bias")
        return None if bias is None or bias.shape not in (shape[:1], shape[1:]) else bias.shape == shape[1:]


def _parent(key: str, levels: int = 2) -> str:
    return ".".join(key.split(".")[:-levels])


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of the model and of what it is made up of."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, dict):
            yield from _model_types(part)
