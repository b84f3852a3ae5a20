"""Prompts together with what each task's own adapter answers to them: no labels, and all that a decoder is to say.

At the tokens of an answer a merged model decides what it says next. Of a prompt alone, a fit sees the first of these
decisions and none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.adapter import Adapter
from coremerge.errors import UnsupportedError
from coremerge.language import answers
from coremerge.learning.backbone import TOKEN_MASK, Batch, frozen, inputs_of
from coremerge.learning.chats import awaits
from coremerge.learning.data import make_batches
from coremerge.learning.decoding import continued
from coremerge.learning.forward import MergedModel, Target
from coremerge.learning.given import moved
from coremerge.learning.rows import Example
from coremerge.learning.speech import Speech, Tokens, lengths, speech_of, with_answers

MOST = 64
"""Tokens of an answer; a longer one is cut, which leaves its beginning."""

MOST_POSITIONS = 1 << 20
"""Of a model that says nothing of them."""

Progress = Callable[[int, int], object]


def answering(adapters: Mapping[str, Adapter], examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The tasks whose adapter answers, and some of whose inputs await an answer."""
    return [task for task, given in examples.items() if answers(adapters[task]) and any(map(_awaits, given))]


def answered_batches(
    model: Any,
    adapters: Mapping[str, Adapter],
    examples: Mapping[str, Sequence[Example]],
    processor: Any,
    *,
    size: int = 16,
    max_length: int | None = None,
    most: int = MOST,
    progress: Progress | None = None,
) -> dict[str, list[Batch]]:
    """Task → batches, in which inputs that await an answer of an adapter that gives some have its own behind them.

    Answers are greedy, as :func:`~coremerge.learning.decoding.decode` finds them. Chats that end with an answer stay as
    they are, and so do the inputs of adapters that do not answer (:func:`coremerge.language.answers`).

    Args:
        model: of ``transformers``, with the head that gives tokens; as it was afterwards.
        adapters: task → adapter.
        examples: task → inputs, see :mod:`coremerge.learning.rows`.
        processor: see :func:`~coremerge.learning.processor.load_processor`.
        size: inputs of a batch.
        max_length: tokens of an input, its answer not counted; a decoder's prompt that is longer is cut at its
            beginning.
        most: tokens of an answer; fewer where the model has no positions for them.
        progress: called with the tasks that are answered, and all that are to be.

    Raises:
        UnsupportedError: the model has no such head.
        CoremergeError: an input that cannot be read, or a model that stops on it.
    """
    tasks = answering(adapters, examples)
    if tasks and model.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no head that gives tokens", key="model",
            remedy="Load it with its head, or fit to the prompts alone",
        )  # fmt: skip
    found: dict[str, list[Batch]] = {}
    for task, given in examples.items():
        asking = [example for example in given if _awaits(example)] if task in tasks else []
        others = [example for example in given if task not in tasks or not _awaits(example)]
        found[task] = make_batches(others, processor, size=size, max_length=max_length) if others else []
        if asking:
            speech = speech_of(model, processor, asking[0])
            cut = "right" if speech.paired else "left"  # what asks is at a prompt's end; an encoder's is as in training
            prompts = make_batches(asking, processor, size=size, max_length=max_length, cut=cut)
            with frozen(model), carrying(model, adapters[task]) as device, inputs_of(task):
                prompts = [moved(batch, device) for batch in prompts]
                found[task] += [moved(batch, torch.device("cpu")) for batch in _answered(model, prompts, speech, most)]
            if progress:
                progress(tasks.index(task) + 1, len(tasks))
    return found


def _awaits(example: Example) -> bool:
    return example.pair is None and (example.messages is None or awaits(example.messages))


@contextmanager
def carrying(model: nn.Module, adapter: Adapter) -> Iterator[torch.device]:
    """``model`` with the updates of ``adapter``, by hooks: its weights are not touched. Gives the device they are on.

    Whole tensors that the adapter carries do not count, as in a fit.
    """
    merged = MergedModel(model, {"": adapter})

    def adding(target: Target) -> Callable[..., Tensor]:
        ones = torch.ones(len(target.owner))

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + target.update(args[0], ones).to(output)

        return add

    with ExitStack() as hooks:
        for target in merged.targets.values():
            hooks.callback(target.module.register_forward_hook(adding(target)).remove)
        yield merged.device


def _answered(model: Any, prompts: Sequence[Batch], speech: Speech, most: int) -> list[Batch]:
    rooms = [min(most, _room(model, batch, speech)) for batch in prompts]
    said: dict[int, list[Tokens]] = {}
    for room in dict.fromkeys(rooms):  # most often one: batches are then answered side by side
        places = [i for i, own in enumerate(rooms) if own == room]
        said |= zip(places, continued(model, [prompts[i] for i in places], speech, room), strict=True)
    return [_with(batch, [row or (speech.end,) for row in said[i]], speech) for i, batch in enumerate(prompts)]


def _room(model: Any, batch: Batch, speech: Speech) -> int:
    """Tokens of an answer that the model has positions for: its last is not read. At least one."""
    config = model.config.get_text_config(decoder=True)
    known = (getattr(config, key, None) for key in ("max_target_positions", "max_position_embeddings", "n_positions"))
    positions = next((value for value in known if isinstance(value, int) and value > 0), None)
    before = len(speech.start) if speech.paired else max(lengths(batch))
    return MOST_POSITIONS if positions is None else max(1, positions - before + 1)


def _with(batch: Batch, said: Sequence[Tokens], speech: Speech) -> Batch:
    """A batch and its answers, of which each token that is decided counts, beside those that counted before."""
    inputs, deciding = with_answers(batch, said, speech)
    if speech.paired:
        counts = torch.tensor([len(speech.start) + len(row) - 1 for row in said], device=deciding.device)
        present = torch.arange(deciding.shape[1], device=deciding.device) < counts.unsqueeze(-1)
        kept = {TOKEN_MASK: batch[TOKEN_MASK]} if TOKEN_MASK in batch else {}
        return {**inputs, **kept, "decoder_attention_mask": present.long()}
    if TOKEN_MASK in batch:
        before = torch.zeros_like(deciding)
        width = min(before.shape[1], batch[TOKEN_MASK].shape[1])  # some processors pad further than is needed
        before[:, :width] = batch[TOKEN_MASK][:, :width].bool()
        inputs[TOKEN_MASK] = (before | deciding).to(batch[TOKEN_MASK].dtype)
    return inputs
