"""Tasks that a language model answers itself: with text of its own, or by the likelihood of given answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np

from coremerge.errors import ConfigError
from coremerge.evaluation.choices import choice_likelihood, choice_tokens
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.likelihood import likelihood
from coremerge.evaluation.metrics import METRICS
from coremerge.evaluation.prompts import Question, read_questions
from coremerge.evaluation.scorer import Groups, Scored
from coremerge.evaluation.taskset import FILE, Split, TaskSet
from coremerge.evaluation.text_metrics import TEXT_METRICS, Answered
from coremerge.learning.backbone import Batch, inputs_of
from coremerge.learning.decoding import decode
from coremerge.learning.processor import Parts, parts_of, usual_length
from coremerge.learning.rows import Example
from coremerge.learning.speech import Placed, Speech, Tokens, lengths, speech_of

TOGETHER = 32
"""Rows that go through at once: of SmolLM2-135M on a CPU, 10 to 25 % faster than 16; 50 are little more so."""

UNCUT = 10**6
"""Tokens: prompts are not cut to fit, as a model then answers another question; they are refused."""


class Asked(NamedTuple):
    """The rows of a split, as the model takes them."""

    questions: list[Question]
    chunks: list[Placed]
    speech: Speech


class _Asking(ABC):
    language: ClassVar[bool] = True

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        self.taskset, self._limits = taskset, limits
        self._known: dict[tuple[str, Split], Asked] = {}

    def count(self, encoder: Encoder, name: str, split: Split) -> int:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        return len(self._asked(encoder, name, split).questions)

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> dict[str, Scored]:
        """See :class:`~coremerge.evaluation.scorer.Scorer`."""
        found = {}
        for name in names:
            with inputs_of(name):
                found[name] = self._one(encoder, name, self._asked(encoder, name, split), intervals)
        return found

    @abstractmethod
    def _one(self, encoder: Encoder, name: str, asked: Asked, intervals: bool) -> Scored:
        """The score of a task's rows."""

    def _asked(self, encoder: Encoder, name: str, split: Split) -> Asked:
        if (name, split) not in self._known:
            questions = read_questions(self.taskset, name, split, self._limits.get(split))
            parts = parts_of(encoder.processor)
            prompts = [untemplated(one.prompt, parts) for one in questions]
            chunks = encoder.placed(prompts, self.taskset.batch or TOGETHER, UNCUT)
            self._check_lengths(questions, chunks, parts)
            speech = speech_of(encoder.model, encoder.processor, questions[0].prompt)
            self._known[name, split] = Asked(questions, chunks, speech)
        return self._known[name, split]

    def _check_lengths(self, questions: Sequence[Question], chunks: Sequence[Placed], parts: Parts) -> None:
        most = self.taskset.max_length or usual_length(parts.tokenizer)
        for places, batch in chunks:
            if "input_ids" in batch and 0 in (counts := lengths(batch)):
                place = questions[places.tolist()[counts.index(0)]].prompt.place
                raise ConfigError("a prompt without a token", file=place, remedy="Ask something, or leave out the row")
            for place, count in zip(places.tolist(), _text_lengths(batch, parts), strict=False):
                if count > most:
                    raise ConfigError(
                        f"a prompt of {count} tokens, and {most} are the most", file=questions[place].prompt.place,
                        remedy=f"Shorten it, or raise max_length in {self.taskset.path(FILE)}",
                    )  # fmt: skip


def untemplated(prompt: Example, parts: Parts) -> Example:
    """A prompt that is no chat, with its image in front: no template is asked where the image goes."""
    token = parts.image_token
    if token is None or prompt.text is None or token in prompt.text:
        return prompt
    return replace(prompt, text=f"{token}\n{prompt.text}")


def _text_lengths(batch: Batch, parts: Parts) -> list[int]:
    """Tokens of each prompt without an image's; of sounds none."""
    if "input_ids" not in batch:
        return []
    ids = getattr(parts.whole, "image_token_id", None)
    own = batch["attention_mask"].bool() & (batch["input_ids"] != (-1 if ids is None else ids))
    counts: list[int] = own.sum(1).tolist()
    return counts


class GenerationScorer(_Asking):
    """Tasks whose answer is text: see :class:`~coremerge.evaluation.scorer.Scorer`.

    Raises:
        MissingExtraError: what a task's metric is computed with is not installed.
    """

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None:
        super().__init__(taskset, names, limits)
        for name in names:
            TEXT_METRICS[taskset.tasks[name].metric].check()

    def _one(self, encoder: Encoder, name: str, asked: Asked, intervals: bool) -> Scored:
        task = self.taskset.tasks[name]
        metric = TEXT_METRICS[task.metric]
        tokens = [asked.speech.tokens(one.answer) for one in asked.questions]
        if not metric.decodes:
            self._check_answers(name, asked.questions, tokens)
        likely = likelihood(encoder.model, asked.chunks, tokens, asked.speech)
        said = decode(encoder.model, asked.chunks, asked.speech, task.max_new_tokens) if metric.decodes else []
        found = Answered(likely, [one.answer.strip() for one in asked.questions], said)
        return Scored(
            metric.score(found),
            metric.interval(found) if intervals else None,
            log_likelihood=float(likely.log.mean()),
            tokens=float(likely.tokens.mean()) if metric.of_perplexity else None,
        )

    def _check_answers(self, name: str, questions: Sequence[Question], tokens: Sequence[Tokens]) -> None:
        most = self.taskset.tasks[name].max_new_tokens
        for one, answer in zip(questions, tokens, strict=True):
            if len(answer) - 1 > most:
                raise ConfigError(
                    f"an answer of {len(answer) - 1} tokens, and max_new_tokens is {most}", file=one.prompt.place,
                    key="answer", value=one.answer, remedy=f"Raise it: tasks.{name} in {self.taskset.path(FILE)}",
                )  # fmt: skip


class ChoiceScorer(_Asking):
    """Tasks whose answer is one of a few: see :class:`~coremerge.evaluation.scorer.Scorer`."""

    def _one(self, encoder: Encoder, name: str, asked: Asked, intervals: bool) -> Scored:
        task = self.taskset.tasks[name]
        logs = choice_likelihood(encoder.model, asked.chunks, choice_tokens(task.choices, asked.speech), asked.speech)
        right = np.array([task.choices.index(one.answer) for one in asked.questions])
        metric, chosen = METRICS[task.metric], logs.argmax(1)
        return Scored(
            metric.score(chosen, right),
            metric.between(chosen, right) if intervals else None,
            log_likelihood=float(logs[np.arange(len(right)), right].mean()),
        )
