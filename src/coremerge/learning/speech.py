"""Prompts and answers as tokens: how a model's begin and end, and prompts with their answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coremerge.errors import CoremergeError
from coremerge.learning.backbone import TOKEN_MASK, Batch, decoder_start
from coremerge.learning.chats import ASSISTANT, render
from coremerge.learning.processor import answer_beginning, parts_of, special_tokens
from coremerge.learning.rows import Example, Message

Tokens = tuple[int, ...]

Placed = tuple[Tensor, Batch]
"""The places of some rows, and the batch that they make."""


@dataclass(frozen=True)
class Speech:
    """How a model speaks.

    Attributes:
        tokenizer: of the model.
        paired: an encoder reads the prompt and a decoder says the answer; else one decoder does both.
        start: what such a decoder is given before every answer.
        beginning: how many tokens the tokenizer puts before an answer, which are no part of it.
        end: the token that ends an answer.
        stops: all tokens that end a generated one.
        pad: the token that fills up.
    """

    tokenizer: Any
    paired: bool
    start: Tokens
    beginning: int
    end: int
    stops: Tokens
    pad: int

    def tokens(self, answer: str, *, ended: bool = True) -> Tokens:
        """An answer's tokens as they follow the prompt, with the one that ends it unless that is left out."""
        if self.paired:
            ids = self.tokenizer(text_target=answer)["input_ids"][self.beginning :]
            ids = ids[:-1] if ids and ids[-1] in self.stops else ids
        else:
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return (*ids, self.end) if ended else tuple(ids)

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens say, without special ones and blanks around it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()


def speech_of(model: Any, processor: Any, example: Example) -> Speech:
    """How ``model`` answers prompts such as ``example``.

    The end of an answer is the chat template's of a turn, of other prompts the tokenizer's end of a text.
    """
    tokenizer = parts_of(processor).tokenizer
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    beginning = answer_beginning(tokenizer) if paired else []
    start = decoder_start(model)
    stops = _listed(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    own = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), tokenizer.pad_token_id)
    end = _end_of_turn(processor, example, own) if example.messages else own
    pad = own if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    before = () if not paired else tuple(beginning) if beginning[:1] == [start] else (start, *beginning)
    return Speech(tokenizer, paired, before, len(beginning), end, tuple(dict.fromkeys((end, own, *stops))), pad)


def _listed(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _end_of_turn(processor: Any, example: Example, usual: int) -> int:
    """The first special token behind an answer in the chat template."""
    parts, word = parts_of(processor), "answer"
    turns = (*(example.messages or ()), Message(ASSISTANT, word))
    try:
        chat = render(Example(messages=turns, image=example.image), parts)
    except CoremergeError:
        return usual
    behind = chat.text[chat.starts[-1] + len(word) :] if chat.starts else ""
    special = special_tokens(parts.tokenizer)
    ids = parts.tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in special), usual)


def lengths(batch: Batch) -> list[int]:
    """Of the texts of a batch that is padded on the right, in tokens."""
    counts: list[int] = batch["attention_mask"].sum(1).tolist()
    return counts


def with_answers(batch: Batch, answers: Sequence[Tokens], speech: Speech) -> tuple[dict[str, Any], Tensor]:
    """What the model is given so that it says, at some positions, how likely each token of ``answers`` is.

    Args:
        batch: of prompts, padded on the right.
        answers: one for each row, one token or more.
        speech: of the model.

    Returns:
        The model's inputs, and (rows, tokens) True at the positions that decide an answer's tokens, in their order.
    """
    inputs = {key: value for key, value in batch.items() if key != TOKEN_MASK}
    if speech.paired:
        ids = torch.tensor([speech.start] * len(answers), device=_first(inputs).device)
        found, mask = _extended({"input_ids": ids}, [len(speech.start)] * len(answers), answers, speech)
        return inputs | {"decoder_input_ids": found["input_ids"]}, mask
    return _extended(inputs, lengths(batch), answers, speech)


def _extended(
    inputs: Mapping[str, Any], before: Sequence[int], answers: Sequence[Tokens], speech: Speech
) -> tuple[dict[str, Any], Tensor]:
    """All of the text's own tensors made longer: by the answers but for their last tokens, and by padding."""
    shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
    width = max(n + len(answer) - 1 for n, answer in zip(before, answers, strict=True))
    found = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            found[key] = value.new_full((shape[0], width), speech.pad if key == "input_ids" else 0)
            for row, n in enumerate(before):
                found[key][row, :n] = value[row, :n]
    mask = torch.zeros(shape[0], width, dtype=torch.bool, device=device)
    for row, (n, answer) in enumerate(zip(before, answers, strict=True)):
        stop = n + len(answer) - 1
        found["input_ids"][row, n:stop] = torch.tensor(answer[:-1], device=device)
        if "attention_mask" in found:
            found["attention_mask"][row, n:stop] = 1
        mask[row, n - 1 : stop] = True
    return found, mask


def before_answers(batch: Batch, speech: Speech) -> dict[str, Any]:
    """What the model is given to go on from: prompts padded on the left, or beside the decoder's first tokens."""
    inputs = {key: value for key, value in batch.items() if key != TOKEN_MASK}
    if speech.paired:
        first = _first(inputs)
        start = torch.tensor([speech.start], device=first.device)
        # what transformers would make up for sounds, with a warning where padding is the token that ends
        mask = {"attention_mask": first.new_ones(first.shape[:2], dtype=torch.long)}
        return mask | inputs | {"decoder_input_ids": start.expand(len(first), -1)}
    shape, counts = inputs["input_ids"].shape, lengths(batch)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            inputs[key] = torch.stack([row.roll(shape[1] - n) for row, n in zip(value, counts, strict=True)])
    return inputs


def _first(inputs: Mapping[str, Any]) -> Tensor:
    return next(value for value in inputs.values() if isinstance(value, Tensor))
