"""Threads on this machine: the default executor."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class Here:
    """One object of this process, as a :class:`~coremerge.executors.Group`."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def call(self, method: str, *given: Any) -> Iterator[Any]:
        """See :class:`~coremerge.executors.Group`; what the method yields is taken as it comes."""
        return iter([getattr(self._held, method)(*given)])

    ask = call

    def close(self) -> None:
        """See :class:`~coremerge.executors.Group`."""
        self._held.close()


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One thread per operator while modules run side by side: the result then does not depend on how many do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(function: Callable[[A], B], items: Iterable[A], threads: int | None = None) -> Generator[B, None, None]:
    """``function`` of each item, in order, with at most ``2 · threads`` of them in flight.

    The first exception ends it, as does ``close()``; what has not started is cancelled.
    """
    threads = threads or default_threads()
    with single_threaded_torch():
        if threads == 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="coremerge")
        window: deque[Future[B]] = deque()
        try:
            for item in items:
                window.append(pool.submit(function, item))
                if len(window) >= 2 * threads:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
