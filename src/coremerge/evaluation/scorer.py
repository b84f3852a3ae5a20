"""What scores the tasks of one kind: a file each, told from here what it is to answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.metrics import Interval
from coremerge.evaluation.taskset import Split, TaskSet

Groups = Mapping[str, Sequence[str]]
"""Name → tasks that are scored together, too: see :attr:`~coremerge.evaluation.TaskSet.joint`."""


class Scored(NamedTuple):
    """One task.

    Attributes:
        value: of its metric.
        interval: 95 % of it; None where that was not asked for.
        log_likelihood: of the right answers, on average, where a language model answers.
        tokens: of an answer on average, where the value is their log-likelihood: shares are of perplexities then.
    """

    value: float
    interval: Interval | None = None
    log_likelihood: float | None = None
    tokens: float | None = None

    def share(self, own: float, *, higher_is_better: bool = True) -> float:
        """Of the own adapter's value: the better, the larger.

        Of log-likelihoods, which have no share: the own adapter's perplexity (of a token) over this one.
        """
        if self.tokens is not None:
            return math.exp((self.value - own) / self.tokens)
        above, below = (self.value, own) if higher_is_better else (own, self.value)
        return above / below if below else math.nan


class Scorer(Protocol):
    """Tasks of one kind. It reads rows when they are first scored, and keeps what it has made of them.

    Attributes:
        language: the base model must keep the head that gives tokens.

    Args:
        taskset: the tasks and where their files lie.
        names: those of this kind.
        limits: rows of each split and task that are used, the first ones; all by default.
    """

    language: ClassVar[bool]

    def __init__(self, taskset: TaskSet, names: Sequence[str], limits: Mapping[Split, int]) -> None: ...

    def score(
        self, encoder: Encoder, names: Sequence[str], split: Split, *, groups: Groups, intervals: bool
    ) -> Mapping[str, Scored]:
        """Task → score, of ``names`` and of ``groups``, under the weights that ``encoder`` carries at the moment."""
        ...

    def count(self, encoder: Encoder, name: str, split: Split) -> int | None:
        """Rows of a task that are scored; None where that is not known before."""
        ...
