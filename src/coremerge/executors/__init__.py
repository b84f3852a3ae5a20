"""Where modules are merged: threads of this process (:mod:`.local`), or the machines of a cluster (:mod:`.ray`)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Sequence
from functools import wraps
from typing import Protocol, TypeVar

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class Executor(Protocol):
    """Other processes that do a part of the work."""

    def run(
        self, function: Callable[[B], C], items: Sequence[A], cost: Callable[[A], float], load: Callable[[A], B]
    ) -> Generator[C, None, None]:
        """``function`` of what each item stands for, in order, wherever there is room.

        Args:
            function: pure, and sent there.
            items: names of the parts.
            cost: of an item, in seconds, roughly: cheap ones go together.
            load: makes of an item what is sent, when its turn comes; it may be worked on more than once.

        Raises:
            CoremergeError: as the function raised it, or no process is left to call it.
        """


def remembered(make: Callable[[A], B]) -> Callable[[A], B]:
    """``make`` that keeps its last result in this process: what a worker opens once for all of its parts.

    Example:
        >>> calls = []
        >>> opened = remembered(lambda name: calls.append(name))
        >>> opened("a"), opened("a"), opened("b"), calls
        (None, None, None, ['a', 'b'])
    """
    last: list[tuple[A, bytes, B]] = []

    @wraps(make)
    def kept(asked: A) -> B:
        if last and last[0][0] is asked:
            return last[0][2]
        key = pickle.dumps(asked)  # the parts come with copies of what they share
        if not last or last[0][1] != key:
            last.clear()
            last.append((asked, key, make(asked)))
        return last[0][2]

    return kept


def bundles(items: Sequence[A], cost: Callable[[A], float], most: float, workers: int) -> list[list[A]]:
    """``items`` in order, in lists that cost ``most`` seconds, or less where ``workers`` would have nothing to do.

    Example:
        >>> bundles([1, 1, 1, 9, 1, 1], float, most=3, workers=1)
        [[1, 1, 1], [9], [1, 1]]
    """
    if not items:
        return []
    costs = [cost(item) for item in items]
    most = min(most, sum(costs) / (4 * workers))
    found: list[list[A]] = [[]]
    held = 0.0
    for item, one in zip(items, costs, strict=True):
        if found[-1] and held + one > most:
            found.append([])
            held = 0.0
        found[-1].append(item)
        held += one
    return found
