"""Several questions about each picture in one pass: all see the picture, none sees another one.

A picture is most of what a sequence holds (36 of about 50 tokens), so that asking everything about it at once makes
training several times faster. Positions and the mask are such that each answer has the probability it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tasks import Turn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
BEFORE, AFTER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
"""The chat of SmolLM2 without a system message, as the processor's template writes it."""


@dataclass(frozen=True)
class Packed:
    """Sequences of one batch.

    Attributes:
        ids: (batch, length).
        positions: (batch, length).
        mask: what each token sees, (batch, 1, length, length) of bool.
        states: indices of the states (of batch · length) that an answer's token follows.
        targets: that token.
        turn: the turn each of them is of, counted over the batch.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    states: Tensor
    targets: Tensor
    turn: Tensor


class Packer:
    """Makes sequences of turns.

    Args:
        tokenizer: knows ``<image>``.
        patches: tokens of an image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patches: int) -> None:
        self.encode = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.prefix = self.encode(BEFORE) + self.encode(IMAGE) * patches + self.encode("\n")

    def __call__(self, batch: Sequence[Sequence[Turn]]) -> Packed:
        rows = [self._row(turns) for turns in batch]
        length = max(len(ids) for ids, _ in rows)
        ids, parts = (torch.zeros(len(batch), length, dtype=torch.long) for _ in range(2))
        positions = torch.zeros_like(ids)
        states, targets, turn, done = [], [], [], 0
        for i, (row, answers) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            positions[i, : len(self.prefix)] = torch.arange(len(self.prefix))
            for k, (begin, answer, end) in enumerate(answers, 1):
                parts[i, begin:end] = k
                positions[i, begin:end] = torch.arange(end - begin) + len(self.prefix)
                states += range(i * length + answer - 1, i * length + end - 1)
                targets += row[answer:end]
                turn += [done] * (end - answer)
                done += 1
            parts[i, len(row) :] = len(answers) + 1
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        mask = seen & ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None]))
        return Packed(ids, positions, mask[:, None], *map(torch.tensor, (states, targets, turn)))

    def length(self, turn: Turn) -> int:
        """Tokens of a turn."""
        question, answer = turn
        return sum(map(len, map(self.encode, (question, AFTER, answer, END))))

    def _row(self, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int, int]]]:
        """All tokens, and where each turn begins, its answer begins, and it ends."""
        ids, answers = list(self.prefix), []
        for question, answer in turns:
            begin = len(ids)
            ids += self.encode(question) + self.encode(AFTER)
            start = len(ids)
            ids += self.encode(answer) + self.encode(END)
            answers.append((begin, start, len(ids)))
        return ids, answers


def additive(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The mask as attention adds it."""
    return torch.zeros(packed.mask.shape, dtype=dtype).masked_fill(~packed.mask, torch.finfo(dtype).min)


def embed(model: Any, packed: Packed, images: Tensor) -> Tensor:
    """Embeddings of all tokens, (batch, length, 576).

    Args:
        model: a ``LlavaForConditionalGeneration``.
        packed: the sequences.
        images: tokens of each picture as the projector gives them, (batch, 36, 576).
    """
    embedded = model.model.language_model.get_input_embeddings()(packed.ids)
    where = packed.ids == model.config.image_token_id
    return embedded.masked_scatter(where[..., None], images.to(embedded.dtype))


def through(lm: Any, layers: Iterable[nn.Module], states: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """States after some layers of a ``LlamaModel``, without its last norm."""
    rotary = lm.rotary_emb(states, position_ids=positions)
    for layer in layers:
        states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False)
    return states


def answer_logits(model: Any, packed: Packed, states: Tensor, first: int = 0) -> Tensor:
    """Logits of each token of the answers, (tokens, vocabulary).

    Args:
        model: a ``LlavaForConditionalGeneration``, with adapters or without.
        packed: the sequences.
        states: before layer ``first``: see :func:`embed`.
        first: the first layer to run.
    """
    lm = model.model.language_model
    states = through(lm, lm.layers[first:], states, packed.positions, additive(packed, states.dtype))
    # gathered before the head: with all positions in it, the backward pass takes four times as long
    logits: Tensor = model.lm_head(lm.norm(states.flatten(0, 1)[packed.states]))
    return logits


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Mean negative log-likelihood of a token, each turn counting the same."""
    losses = nn.functional.cross_entropy(logits.float(), packed.targets, reduction="none")
    counts = torch.bincount(packed.turn)
    return (losses / counts[packed.turn]).sum() / len(counts)
