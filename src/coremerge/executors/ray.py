"""A Ray cluster; Ray comes with the extra ``ray``.

Work goes out as tasks, which Ray tries again elsewhere when a worker or a whole machine is lost. A function is sent
once; each worker process keeps what the function itself caches.
"""

from __future__ import annotations

import importlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from coremerge.errors import ConfigError, CoremergeError, MissingExtraError
from coremerge.executors import Group, bundles
from coremerge.executors.holders import Holders
from coremerge.executors.local import single_threaded_torch
from coremerge.installing import install

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

SECONDS = 1.0
"""Of work in one task: much more than Ray's own milliseconds, little enough to lose."""

AHEAD = 3
"""Tasks in flight for each processor of the cluster."""

RETRIES = 8
"""Times that a task whose worker died is tried again before it is to blame itself."""

PATIENCE = 5.0
"""Seconds for a cluster to take a connection."""

END_SECONDS = 30.0
"""That what is cancelled is waited for."""


class LostError(CoremergeError):
    """Process after process died at it."""


class Ray:
    """Tasks on a Ray cluster.

    Args:
        address: of a running cluster, as Ray takes it (``auto``, ``host:port``, ``ray://host:port``); None: the one
            that ``RAY_ADDRESS`` names or that runs on this machine, else one that is started here and stopped with
            :meth:`close`.
        gpus: of each task.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: no cluster answers there, or it has no such GPU.

    Example:
        >>> from coremerge.pipeline import merge_files
        >>> with Ray() as cluster:  # doctest: +SKIP
        ...     merge_files(["math", "code"], "merged", executor=cluster)
    """

    def __init__(self, address: str | None = None, *, gpus: float = 0) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise MissingExtraError("a cluster needs Ray", remedy=install("ray")) from None
        self._ray, self._gpus, self._ours = ray, gpus, not ray.is_initialized()
        if self._ours:
            _start(ray, address)
        if gpus and not ray.cluster_resources().get("GPU", 0) >= gpus:
            self.close()
            raise ConfigError("no machine of the cluster has a GPU", key="device", remedy="Use --device cpu")

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, and stop it if it was started here."""
        if self._ours:
            self._ray.shutdown()

    @property
    def workers(self) -> int:
        """Tasks that the cluster can run side by side now."""
        resources = self._ray.cluster_resources()
        room = resources.get("GPU", 0) / self._gpus if self._gpus else resources.get("CPU", 1)
        return max(1, int(room))

    @property
    def replicas(self) -> int:
        """See :class:`~coremerge.executors.Executor`."""
        machines = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        return self.workers if self._gpus else max(1, len(machines))

    def hold(self, make: Callable[[A], Any], items: Sequence[A]) -> Group:
        """See :class:`~coremerge.executors.Executor`."""
        return Holders(self._ray, make, items, gpus=self._gpus, result=self._result, tries=RETRIES)

    def run(
        self,
        function: Callable[[B], C],
        items: Sequence[A],
        cost: Callable[[A], float],
        load: Callable[[A], B],
        lost: Callable[[A, CoremergeError], C] | None = None,
    ) -> Generator[C, None, None]:
        """See :class:`~coremerge.executors.Executor`."""
        held = self._ray.put(function)
        task = self._ray.remote(_each).options(
            num_cpus=1, num_gpus=self._gpus, max_retries=RETRIES, name=getattr(function, "__name__", "coremerge")
        )
        waiting: deque[tuple[Any, list[A]]] = deque()
        try:
            for bundle in bundles(items, cost, SECONDS, self.workers):
                waiting.append((task.remote(held, [load(item) for item in bundle]), bundle))
                if len(waiting) >= AHEAD * self.workers:
                    yield from self._results(*waiting.popleft(), lost)
            while waiting:
                yield from self._results(*waiting.popleft(), lost)
        finally:
            self._end([one for one, _ in waiting])

    def _end(self, references: list[Any]) -> None:
        """Cancel, and wait for those that are at work: they may have files open in a folder that is removed next."""
        for one in references:
            self._ray.cancel(one)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=END_SECONDS)

    def _results(
        self, reference: Any, bundle: Sequence[A], lost: Callable[[A, CoremergeError], C] | None
    ) -> Sequence[C]:
        try:
            found: list[C] = self._result(reference)
            return found
        except LostError as error:
            if lost is None:
                raise
            return [lost(item, error) for item in bundle]

    def _result(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, errors.RaySystemError) and "No module named" in str(cause):
                raise ConfigError(
                    "its workers cannot load coremerge", key="executor", value="ray",
                    remedy="Install the same version on all machines",
                ) from None  # fmt: skip
            raise (cause if isinstance(cause, (CoremergeError, OSError, MemoryError)) else error) from None
        except errors.RayError as error:
            first = str(error).strip().partition("\n")[0]
            raise LostError(
                f"the cluster lost a part of the work {RETRIES + 1} times: {type(error).__name__}: {first}",
                remedy="Its workers may lack memory: see the cluster's logs",
            ) from None


def _each(function: Callable[[A], B], items: list[A]) -> list[B]:
    with single_threaded_torch():
        return [function(item) for item in items]


def _start(ray: Any, address: str | None) -> None:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"no Ray cluster answers: {first}", key="address", value=address,
            remedy="Start one with 'ray start --head', or leave the address out for one on this machine",
        ) from None  # fmt: skip


def _knock(address: str | None) -> None:
    """Raises OSError where nothing listens at ``host:port``: Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
