"""Whether an adapter is of a language model that generates text: told from its config, else from its modules' names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coremerge.adapter import Adapter

GENERATES = "CAUSAL_LM"
"""PEFT's task type of such models."""

BENEATH_A_HEAD = (
    "model.layers.", "transformer.h.", "gpt_neox.layers.", "model.language_model.", "language_model.model.layers.",
)  # fmt: skip
"""How modules' names begin in decoders that have a language head: without one they have no prefix."""


ANSWERS = (GENERATES, "SEQ_2_SEQ_LM")
"""Task types of models whose output is text."""

DECODERS = (*BENEATH_A_HEAD, "model.decoder.layers.", "decoder.block.")
"""How modules' names begin in what says that text, the decoders of encoders among them."""


def answers(adapter: Adapter) -> bool:
    """Whether it is of a model whose output is text, of a decoder or of an encoder with one; told as above."""
    if adapter.info.task_type:
        return adapter.info.task_type in ANSWERS
    return any(name.startswith(DECODERS) for name in adapter)


def generates(adapter: Adapter) -> bool:
    """Whether its config says so, or, where it names no task, its modules lie beneath a language head."""
    if adapter.info.task_type:
        return adapter.info.task_type == GENERATES
    return any(name.startswith(BENEATH_A_HEAD) for name in adapter)
