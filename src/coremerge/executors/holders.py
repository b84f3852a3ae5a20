"""Objects that live on a Ray cluster: one that is lost is made anew, and told again all that it had been told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import GeneratorType
from typing import Any, TypeVar

from coremerge.executors.local import default_threads

A = TypeVar("A")

Said = tuple[str, Any]
"""A method's name, and a reference to what it is given."""

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
        self._told: list[Said] = []
        self._live: list[Any] = [None] * len(items)
        self._begun: list[list[Any]] = [[] for _ in items]
        self._lost = [0] * len(items)
        for at in range(len(items)):
            self._begin(at)

    def call(self, method: str, *given: Any) -> Iterator[Any]:
        """See :class:`~coremerge.executors.Group`."""
        said = method, self._ray.put(given)
        found = self._answers(said)
        self._told.append(said)
        return found

    def ask(self, method: str, *given: Any) -> Iterator[Any]:
        """See :class:`~coremerge.executors.Group`."""
        return self._answers((method, self._ray.put(given)))

    def _answers(self, said: Said) -> Iterator[Any]:
        before = list(self._told)
        waiting = [self._live[at].call.remote(*said) for at in range(len(self._live))]
        return (self._answer(at, reference, said, before) for at, reference in enumerate(waiting))

    def close(self) -> None:
        """See :class:`~coremerge.executors.Group`."""
        ends = [one.call.remote("close", ()) for one in self._live]
        self._ray.wait(ends, num_returns=len(ends), timeout=10)
        for one in self._live:
            self._ray.kill(one)

    def _begin(self, at: int) -> None:
        self._live[at] = self._kind.remote()
        self._begun[at] = [self._live[at].begin.remote(self._make, self._items[at])]

    def _answer(self, at: int, reference: Any, said: Said, before: Sequence[Said]) -> Any:
        errors = self._ray.exceptions
        while True:
            try:
                return self._ray.get([*self._begun[at], reference])[-1]
            except (errors.RayActorError, errors.ObjectLostError):
                self._lost[at] += 1
                if self._lost[at] > self._tries:
                    return self._result(reference)
            except errors.RayError:
                return [self._result(one) for one in (*self._begun[at], reference)][-1]  # what went wrong first
            reference = self._anew(at, said, before)

    def _anew(self, at: int, said: Said, before: Sequence[Said]) -> Any:
        """One in the place of one that was lost: what it answers to what was said last."""
        self._begin(at)
        methods, given = [method for method, _ in before], [one for _, one in before]
        self._begun[at].append(self._live[at].again.remote(methods, *given))
        return self._live[at].call.remote(*said)
