"""Where modules are merged: threads of this process (:mod:`.local`), or the machines of a cluster (:mod:`.ray`)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from coremerge.errors import CoremergeError

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class Group(Protocol):
    """Objects that stay where they are, here or in other processes, and are told things."""

    def ask(self, method: str, *given: Any) -> Iterator[Any]:
        """As :meth:`call`, of a method that changes nothing: one in the place of another is not asked it again."""

    def call(self, method: str, *given: Any) -> Iterator[Any]:
        """What each one's ``method`` gives for ``given``, in order; what it yields comes as a list.

        All of it is to be taken before the next call.

        Raises:
            CoremergeError: as the method raised it, or an object was lost again and again.
        """

    def close(self) -> None:
        """Let go of the objects."""


class Executor(Protocol):
    """Other processes that do a part of the work."""

    @property
    def replicas(self) -> int:
        """How many models it has room for: one a machine, or one for each of its GPUs."""

    def hold(self, make: Callable[[A], Any], items: Sequence[A]) -> Group:
        """An object that ``make`` makes of each item, there.

        One that is lost is made anew and told all that it had been told, so that it must depend on that alone.
        """

    def run(
        self,
        function: Callable[[B], C],
        items: Sequence[A],
        cost: Callable[[A], float],
        load: Callable[[A], B],
        lost: Callable[[A, CoremergeError], C] | None = None,
    ) -> Generator[C, None, None]:
        """``function`` of what each item stands for, in order, wherever there is room.

        Args:
            function: pure, and sent there.
            items: names of the parts.
            cost: of an item, in seconds, roughly: cheap ones go together.
            load: makes of an item what is sent, when its turn comes; it may be worked on more than once.
            lost: makes what stands for the result of an item on which process after process died; by default it is the
                end of the others, too.

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


def shares(items: Sequence[A], count: int) -> list[list[A]]:
    """``items`` in order, in at most ``count`` lists of nearly the same length.

    Example:
        >>> shares("abcde", 2), shares("ab", 3)
        ([['a', 'b', 'c'], ['d', 'e']], [['a'], ['b']])
    """
    count = max(1, min(count, len(items)))
    edges = [-(-len(items) * i // count) for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(edges)]


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
