"""From rows to tokens: a task's prompt about a row, and its answer with the end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from splits import Fields
from torch import Tensor

IGNORED = -100


class Question(NamedTuple):
    """A prompt's tokens and its answer's, the end token last."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Prompter:
    """What a task asks about a row, in the base's own tokens."""

    def __init__(self, tokenizer: Any, task: Any) -> None:
        self.tokenizer, self.task = tokenizer, task

    def question(self, fields: Fields, answer: str | None = None) -> Question:
        """The row with its own answer, or with another one."""
        said = answer if answer is not None else fields.get("answer", fields.get("label", ""))
        tokens = self.tokenizer(said, add_special_tokens=False).input_ids
        prompt = self.tokenizer(self.prompt(fields), add_special_tokens=False).input_ids
        return Question(prompt, [*tokens, self.tokenizer.eos_token_id])

    def prompt(self, fields: Fields) -> str:
        if not self.task.chat:
            return str(self.task.prompt.format(**fields))
        messages = self.unlabelled(fields)["messages"]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def unlabelled(self, fields: Fields) -> dict[str, Any]:
        """The prompt as an input of ``fit`` and ``learn-weights``: a chat, or a text."""
        text = self.task.prompt.format(**fields)
        if not self.task.chat:
            return {"text": text}
        turns = [{"role": "system", "content": self.task.system}, {"role": "user", "content": text}]
        return {"messages": turns}


class Batch(NamedTuple):
    """Questions padded on the right: nothing sees the padding in a causal model."""

    ids: Tensor
    """(batch, length)."""
    mask: Tensor
    labels: Tensor
    """The answers' tokens where they stand, IGNORED elsewhere."""


def collate(questions: Sequence[Question], pad: int) -> Batch:
    length = max(question.length for question in questions)
    ids = torch.full((len(questions), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, question in enumerate(questions):
        ids[i, : question.length] = torch.tensor([*question.prompt, *question.answer])
        mask[i, : question.length] = 1
        labels[i, len(question.prompt) : question.length] = torch.tensor(question.answer)
    return Batch(ids, mask, labels)


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Logits (tokens, vocabulary) where an answer's token comes next, these tokens, and how many each row has.

    Hidden states are gathered before the output layer: it is the dearest one, and most positions do not need it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    next_tokens = batch.labels[:, 1:]
    counted = next_tokens != IGNORED
    logits = inner.lm_head(hidden[:, :-1][counted]).float()
    return logits, next_tokens[counted], counted.sum(1).tolist()
