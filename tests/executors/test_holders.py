"""Objects on a real cluster of two nodes: what they were told survives their processes, and a node."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from coremerge.errors import CoremergeError, InputError, SourceError
from coremerge.executors.ray import Ray
from coremerge.formats import load
from coremerge.learning import fit
from families import batches, make_adapter, make_model

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


def counting() -> Any:
    """A class that is sent as it is: workers cannot import this file."""

    class Counting:
        """Adds up what it is told."""

        def __init__(self, start: int) -> None:
            self.sum = start

        def add(self, more: int) -> int:
            self.sum += more
            return self.sum

        def each(self) -> Iterator[int]:
            yield from range(self.sum)

        def refuse(self) -> None:
            raise InputError("no", key="k", remedy="Do")

        def process(self) -> int:
            return os.getpid()

        def die(self) -> None:
            os._exit(1)

        def close(self) -> None:
            pass

    return Counting


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def executor(cluster: Any) -> Iterator[Ray]:
    cluster.add_node(num_cpus=1)
    with Ray(cluster.address) as made:
        yield made


def test_what_they_were_told_survives_their_processes(executor: Ray) -> None:
    assert executor.replicas == 2
    group = executor.hold(counting(), [1, 10, 100])
    assert list(group.call("add", 1)) == [2, 11, 101] and next(group.call("each")) == [0, 1]
    before = list(group.ask("process"))
    os.kill(before[1], signal.SIGKILL)
    assert list(group.call("add", 5)) == [7, 16, 106]
    after = list(group.ask("process"))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    group.close()


def test_errors_are_theirs(executor: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coremerge.executors.ray.RETRIES", 1)
    group = executor.hold(counting(), [1])
    with pytest.raises(InputError, match="k: no"):
        list(group.ask("refuse"))
    assert list(group.call("add", 1)) == [2]
    with pytest.raises(CoremergeError, match="lost a part"):
        list(group.call("die"))
    group.close()
    with pytest.raises(SourceError, match="no such file"):
        list(executor.hold(load, ["/nowhere"]).call("close"))


def test_a_fit_survives_a_worker_and_a_node(executor: Ray, cluster: Any, tmp_path: Path) -> None:
    adapters = {name: make_adapter("bert", tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    data = {name: batches("bert", 3, seed) for seed, name in enumerate("ab")}
    spare = cluster.add_node(num_cpus=1)
    steps = count()

    def harm(*_: object) -> None:
        at = next(steps)
        if at == 2:
            os.kill(holders()[0], signal.SIGKILL)
        if at == 5:
            cluster.remove_node(spare)

    whole = fit(make_model("bert"), adapters, data).adapter.save(tmp_path / "here").path
    shared = fit(make_model("bert"), adapters, data, executor=executor, progress=harm).adapter.save(tmp_path / "there")
    name = "adapter_model.safetensors"
    assert next(steps) > 6 and (whole / name).read_bytes() == (shared.path / name).read_bytes()


def holders() -> list[int]:
    """Processes of objects that are held."""
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if "ray::Holder" in " ".join(p.info["cmdline"] or [])]
