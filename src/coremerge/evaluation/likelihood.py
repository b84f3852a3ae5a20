"""How likely a model finds answers: one pass over prompts and answers, with logits at the answers' positions alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coremerge.executors import local
from coremerge.learning.backbone import check_numbers, run_model
from coremerge.learning.speech import Placed, Speech, Tokens, with_answers

ROWS = 256
"""Positions whose logits are turned into float32 at a time."""


class Likelihood(NamedTuple):
    """Of the answer of each row.

    Attributes:
        log: (rows,) natural logarithm of its probability, the token that ends it included.
        tokens: (rows,) how many it has.
        right: (rows,) whether greedy decoding would say exactly this: each token is the likeliest after those before
            it, and what is likeliest then ends the answer.
    """

    log: NDArray[np.float64]
    tokens: NDArray[np.int64]
    right: NDArray[np.bool_]


def likelihood(model: nn.Module, chunks: Sequence[Placed], answers: Sequence[Tokens], speech: Speech) -> Likelihood:
    """Of each row's answer, in the order of the rows.

    Args:
        model: with its head.
        chunks: prompts, each with its rows' places.
        answers: of all rows, the token that ends each included.
        speech: of the model.
    """
    with logits_at(model) as run:
        found = list(local.run(partial(_of_chunk, run, answers, speech), chunks))
    order = np.argsort(np.concatenate([places.numpy() for places, _ in chunks]))
    log, tokens, right = (np.concatenate(part)[order] for part in zip(*found, strict=True))
    return Likelihood(log, tokens, right)


Run = Callable[[dict[str, Any], Tensor], Tensor]
"""Of a model's inputs and a mask (rows, tokens): the logits (positions, vocabulary) where it is True, row by row."""


@contextmanager
def logits_at(model: Any) -> Iterator[Run]:
    """``model``, run so that its head sees no other positions.

    They are picked out before the head, as a matrix of two dimensions: of a vocabulary of 49,152, logits at every
    position took longer than the 30 blocks of a model of 135 million parameters.
    """
    head = model.get_output_embeddings()
    here = threading.local()

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][here.mask], *args[1:]

    @torch.inference_mode()
    def run(inputs: dict[str, Any], mask: Tensor) -> Tensor:
        here.mask = mask
        logits: Tensor = run_model(model, inputs, partial(model, **inputs, use_cache=False)).logits
        return logits if head is not None else logits[mask]

    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield run
    finally:
        if handle is not None:
            handle.remove()


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax (positions, vocabulary) at ``tokens`` (positions, k), in float32: (positions, k).

    Raises:
        NotFiniteError: a logit is no number.
    """
    parts = (slice(at, at + ROWS) for at in range(0, max(len(logits), 1), ROWS))
    found = torch.cat([_log_softmax(logits[part].float(), tokens[part]) for part in parts]).cpu()
    check_numbers(found)
    return found


def _log_softmax(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)


@torch.inference_mode()
def _of_chunk(run: Run, answers: Sequence[Tokens], speech: Speech, chunk: Placed) -> tuple[Any, Any, Any]:
    places, batch = chunk
    own = [answers[i] for i in places.tolist()]
    logits = run(*with_answers(batch, own, speech))
    tokens = torch.tensor([token for answer in own for token in answer], device=logits.device)
    logs = log_probabilities(logits, tokens[:, None])[:, 0].double().numpy()
    said, sums, right, at = logits.argmax(-1).tolist(), [], [], 0
    for answer in own:
        *body, last = said[at : at + len(answer)]
        right.append(tuple(body) == answer[:-1] and last in speech.stops)
        sums.append(logs[at : at + len(answer)].sum())
        at += len(answer)
    return np.array(sums), np.array([len(answer) for answer in own]), np.array(right)
