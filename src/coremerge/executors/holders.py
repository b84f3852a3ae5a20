"""Objects that live on a Ray cluster: one that is lost is made anew, and told again all that it had been told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import GeneratorType
from typing import Any, TypeVar

from coremerge.executors.local import default_threads

A = TypeVar("A")

SPREAD = "SPREAD"
"""Ray's name for as few on one machine as can be."""


class Holder:
    """What runs in the other process."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(default_threads())  # Ray has set it to one
        self._held: Any = None

    def begin(self, make: Callable[[A], Any], item: A) -> None:
        """Make the object."""
        self._held = make(item)

    def call(self, method: str, given: tuple[Any, ...]) -> Any:
        """The object's method."""
        found = getattr(self._held, method)(*given)
        return list(found) if isinstance(found, GeneratorType) else found

    def again(self, methods: Sequence[str], *given: tuple[Any, ...]) -> None:
        """All that one before it was told."""
        for method, one in zip(methods, given, strict=True):
            self.call(method, one)


class Holders:
    """Several of them: see :class:`~coremerge.executors.Group`.

    Args:
        ray: the module.
        make: what makes an object of an item.
        items: of each object.
        gpus: of each.
        result: fetches what a reference stands for, or raises one of our own errors.
        tries: times that one may be lost.
    """

    def __init__(
        self, ray: Any, make: Callable[[A], Any], items: Sequence[A], *, gpus: float, result: Callable[[Any], Any],
        tries: int,
    ) -> None:  # fmt: skip
        self._ray, self._result, self._tries = ray, result, tries
        # nothing asked for: a processor to begin on and none to stay, so that it fits in wherever others were lost
        room = {"num_gpus": gpus} if gpus else {}
        self._kind = ray.remote(Holder).options(scheduling_strategy=SPREAD, max_restarts=0, **room)
        self._make, self._items = ray.put(make), [ray.put(item) for item in items]
        self._told: list[tuple[str, Any]] = []
        self._live: list[Any] = [None] * len(items)
        self._begun: list[Any] = [None] * len(items)
        self._lost = [0] * len(items)
        for at in range(len(items)):
            self._begin(at)

    def call(self, method: str, *given: Any) -> Iterator[Any]:
        """See :class:`~coremerge.executors.Group`."""
        self._told.append((method, self._ray.put(given)))
        waiting = [self._ask(at) for at in range(len(self._live))]
        return (self._answer(at, reference) for at, reference in enumerate(waiting))

    def close(self) -> None:
        """See :class:`~coremerge.executors.Group`."""
        ends = [one.call.remote("close", ()) for one in self._live]
        self._ray.wait(ends, num_returns=len(ends), timeout=10)
        for one in self._live:
            self._ray.kill(one)

    def _begin(self, at: int) -> None:
        self._live[at] = self._kind.remote()
        self._begun[at] = self._live[at].begin.remote(self._make, self._items[at])

    def _ask(self, at: int) -> Any:
        method, given = self._told[-1]
        return self._live[at].call.remote(method, given)

    def _answer(self, at: int, reference: Any) -> Any:
        errors = self._ray.exceptions
        while True:
            try:
                return self._ray.get(reference)
            except (errors.RayActorError, errors.ObjectLostError):
                self._lost[at] += 1
                if self._lost[at] > self._tries:
                    return self._result(reference)
            except errors.RayError:
                self._result(self._begun[at])  # what went wrong first
                return self._result(reference)
            reference = self._anew(at)

    def _anew(self, at: int) -> Any:
        """One in the place of one that was lost: what it answers to the last call."""
        self._begin(at)
        before = self._told[:-1]
        self._live[at].again.remote([method for method, _ in before], *(given for _, given in before))
        return self._ask(at)
