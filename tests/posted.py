"""An executor without other processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from types import GeneratorType
from typing import Any

from coremerge.errors import CoremergeError


class Posted:
    """An executor that does the work here, with all that goes there and back as bytes; twice, as after a crash.

    Args:
        deadly: whether every process dies of an item.
    """

    def __init__(self, deadly: Callable[[Any], bool] = lambda item: False) -> None:
        self.sent: list[int] = []
        self.deadly = deadly

    def run(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        cost: Callable[[Any], float],
        load: Callable[[Any], Any],
        lost: Callable[[Any, CoremergeError], Any] | None = None,
    ) -> Generator[Any, None, None]:
        made = pickle.dumps(function)
        for item in items:
            assert cost(item) > 0
            letter = pickle.dumps(load(item))
            self.sent.append(len(letter))
            if lost and self.deadly(item):
                yield pickle.loads(pickle.dumps(lost(item, CoremergeError("lost"))))
                continue
            pickle.loads(made)(pickle.loads(letter))
            yield pickle.loads(pickle.dumps(pickle.loads(made)(pickle.loads(letter))))

    replicas = 2

    def hold(self, make: Callable[[Any], Any], items: Sequence[Any]) -> PostedGroup:
        return PostedGroup(pickle.dumps(make), [pickle.dumps(item) for item in items])


class PostedGroup:
    """Objects that are lost after every third call."""

    def __init__(self, make: bytes, items: Sequence[bytes]) -> None:
        self.make, self.items = make, items
        self.told: list[tuple[str, bytes]] = []
        self.held = [self.made(item) for item in items]

    def made(self, item: bytes) -> Any:
        return pickle.loads(self.make)(pickle.loads(item))

    def call(self, method: str, *given: Any) -> Iterator[Any]:
        self.told.append((method, pickle.dumps(given)))
        if len(self.told) % 3 == 0:
            self.close()
            self.held = [self.made(item) for item in self.items]
            for before in self.told[:-1]:
                for one in self.held:
                    tell(one, *before)
        return iter([tell(one, *self.told[-1]) for one in self.held])

    def ask(self, method: str, *given: Any) -> Iterator[Any]:
        said = method, pickle.dumps(given)
        return iter([tell(one, *said) for one in self.held])

    def close(self) -> None:
        for one in self.held:
            one.close()


def tell(one: Any, method: str, given: bytes) -> Any:
    found = getattr(one, method)(*pickle.loads(given))
    return pickle.loads(pickle.dumps(list(found) if isinstance(found, GeneratorType) else found))
