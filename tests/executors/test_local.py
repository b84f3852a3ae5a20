import os
import threading
from collections.abc import Iterator

import pytest
import torch

from coremerge.executors import local


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_results_come_in_order(threads: int | None) -> None:
    assert list(local.run(lambda x: x * x, range(20), threads)) == [x * x for x in range(20)]
    assert list(local.run(lambda x: x, [], threads)) == []


def test_no_more_than_twice_the_threads_are_in_flight() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(50):
            taken.append(i)
            yield i

    results = local.run(lambda x: x, items(), 2)
    next(results)
    assert len(taken) == 4
    next(results)
    assert len(taken) == 5
    results.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_first_failure_ends_it_and_cancels_the_rest(threads: int, error: type[BaseException]) -> None:
    started = []

    def work(x: int) -> int:
        started.append(x)
        if x == 1:
            raise error("no")
        return x

    alive = threading.active_count()
    results = local.run(work, range(100), threads)
    assert next(results) == 0
    with pytest.raises(error, match="no"):
        list(results)
    assert len(started) < 8
    assert threading.active_count() == alive


@pytest.mark.parametrize("threads", [1, 3])
def test_a_consumer_that_stops_stops_the_workers(threads: int) -> None:
    started = []
    results = local.run(started.append, range(100), threads)
    next(results)
    results.close()
    assert len(started) <= 2 * threads + 1


@pytest.mark.parametrize("threads", [1, 2])
def test_operators_are_single_threaded_meanwhile_and_restored(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(local.run(lambda _: torch.get_num_threads(), range(3), threads)) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(local.run(lambda x: 1 // x, range(3), threads))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_processors_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= local.default_threads() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert local.default_threads() == (os.cpu_count() or 1)
