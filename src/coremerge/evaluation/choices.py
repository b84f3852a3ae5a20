"""Which of some answers a model finds the likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coremerge.errors import ConfigError
from coremerge.evaluation.likelihood import Run, log_probabilities, logits_at
from coremerge.executors import local
from coremerge.learning.speech import Placed, Speech, Tokens, with_answers


def choice_tokens(choices: Sequence[str], speech: Speech) -> list[Tokens]:
    """Each choice's tokens; with the one that ends an answer where one choice is the beginning of another.

    Otherwise they exclude each other as they are, and choices of one token need a single pass.

    Raises:
        ConfigError: two are the same tokens.
    """
    tokens = [speech.tokens(choice, ended=False) for choice in choices]
    for at, one in enumerate(tokens):
        if one in tokens[:at]:
            raise ConfigError(
                "two choices are the same tokens to the base model, so that it cannot choose between them",
                key="choices", value=[choices[tokens.index(one)], choices[at]], remedy="Word one of them otherwise",
            )  # fmt: skip
    nested = any(a is not b and b[: len(a)] == a for a in tokens for b in tokens)
    return [(*one, speech.end) for one in tokens] if nested else tokens


def choice_likelihood(
    model: nn.Module, chunks: Sequence[Placed], choices: Sequence[Tokens], speech: Speech
) -> NDArray[np.float64]:
    """(rows, choices) logarithm of the probability of each choice after each prompt, in the order of the rows.

    Choices that differ in their last token alone come from one pass.
    """
    with logits_at(model) as run:
        found = list(local.run(partial(_of_chunk, run, choices, speech), chunks))
    order = np.argsort(np.concatenate([places.numpy() for places, _ in chunks]))
    logs: NDArray[np.float64] = np.concatenate(found)[order]
    return logs


@torch.inference_mode()
def _of_chunk(run: Run, choices: Sequence[Tokens], speech: Speech, chunk: Placed) -> NDArray[np.float64]:
    rows = len(chunk[0])
    logs = np.empty((rows, len(choices)))
    for body, members in _passes(choices):
        first = choices[members[0]]
        logits = run(*with_answers(chunk[1], [first] * rows, speech)).view(rows, len(first), -1)
        before = log_probabilities(logits[:, :-1].flatten(0, 1), _repeated(body, rows, logits)).view(rows, -1)
        last = log_probabilities(logits[:, -1], _repeated([choices[k][-1] for k in members], rows, logits, -1))
        logs[:, members] = (before.double().sum(1, keepdim=True) + last.double()).numpy()
    return logs


def _passes(choices: Sequence[Tokens]) -> Iterator[tuple[Tokens, list[int]]]:
    """All tokens of a choice but the last, and the choices of which they are."""
    for body in dict.fromkeys(choice[:-1] for choice in choices):
        yield body, [k for k, choice in enumerate(choices) if choice[:-1] == body]


def _repeated(tokens: Sequence[int], rows: int, like: Tensor, width: int = 1) -> Tensor:
    """``tokens`` once a row: (rows, n), or one below another: (rows · n, 1)."""
    found = torch.tensor(list(tokens), dtype=torch.long, device=like.device).expand(rows, -1)
    return found.reshape(-1, 1) if width == 1 else found
