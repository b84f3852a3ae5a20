"""A real cluster, of two nodes on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from operator import mul, truediv
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from coremerge.batch import run_batch
from coremerge.errors import ConfigError, CoremergeError, MissingExtraError, SourceError
from coremerge.executors.ray import RETRIES, Ray
from coremerge.formats import load
from coremerge.manifest import Manifest
from coremerge.pipeline import merge_files
from tiny import make_adapter, make_base

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1)


@pytest.fixture(scope="module")
def executor(cluster: Any, node: Any) -> Iterator[Ray]:
    with Ray(cluster.address) as made:
        yield made


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [make_adapter(tmp_path / name, seed=seed, layers=20) for seed, name in enumerate("ABC")]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def run(executor: Ray, function: Any, items: Any) -> list[Any]:
    return list(executor.run(function, items, lambda x: 1.0, lambda x: x))


def test_results_come_in_order(executor: Ray) -> None:
    assert executor.workers == 2
    assert run(executor, partial(mul, 2), range(20)) == [2 * x for x in range(20)] and run(executor, abs, []) == []


def test_errors_are_those_of_the_function(executor: Ray) -> None:
    with pytest.raises(SourceError, match="no such file") as caught:
        run(executor, load, ["/nowhere"])
    assert caught.value.file == "/nowhere" and "Give an adapter's folder" in (caught.value.remedy or "")
    with pytest.raises(ZeroDivisionError):
        run(executor, partial(truediv, 1), range(3))


def test_work_that_kills_its_workers_is_given_up(executor: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coremerge.executors.ray.RETRIES", 0)
    with pytest.raises(CoremergeError, match="lost a part of the work 1 times"):
        run(executor, os._exit, [1])
    assert RETRIES > 0


def test_the_bytes_survive_a_worker_and_a_node(
    executor: Ray, cluster: Any, node: Any, sources: list[Path], tmp_path: Path
) -> None:
    merge_files(sources, tmp_path / "here")
    lost: list[str] = []
    workers = {pid for pid in run(executor, lambda _: os.getpid(), range(8)) if psutil.pid_exists(pid)}
    assert workers and os.getpid() not in workers

    def harm(stage: str, done: int, count: int) -> None:
        if stage == "merging" and not lost:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            lost.append("workers")
        if stage == "writing" and "node" not in lost:
            cluster.remove_node(node)
            lost.append("node")

    merge_files(sources, tmp_path / "there", executor=executor, progress=harm)
    assert set(lost) == {"workers", "node"}
    assert files(tmp_path / "here") == files(tmp_path / "there")
    base = make_base(tmp_path / "base", 20)
    merge_files(sources, tmp_path / "in", into=base)
    merge_files(sources, tmp_path / "in there", into=base, executor=executor)
    assert files(tmp_path / "in") == files(tmp_path / "in there")


class Murderous:
    """A cluster on which every job's first process is killed when all but the last step is done."""

    def __init__(self, executor: Ray, folder: Path) -> None:
        self.executor, self.folder = executor, folder

    def run(self, function: Any, *rest: Any, **options: Any) -> Any:
        folder = self.folder

        def once(letter: Any) -> Any:
            mark = folder / letter[0].name.replace("/", " ")
            if mark.exists():
                return function(letter)
            mark.touch()
            with mock.patch("coremerge.formats.atomic._swap", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
                return function(letter)

        return self.executor.run(once, *rest, **options)


def test_jobs_whose_processes_are_killed_are_done_again(executor: Ray, sources: list[Path], tmp_path: Path) -> None:
    base, deadly = make_base(tmp_path / "base", 20), tmp_path / "marks"
    deadly.mkdir()
    places = list(map(str, sources))
    sets = {"all": places, "gone": ["/nowhere"], "model": {"models": places[:2], "into": str(base)}}
    manifest = Manifest.model_validate({"sets": sets, "recipes": {"default": {}, "ties": {"merge_method": "ties"}}})
    here = run_batch(manifest, tmp_path / "here")
    there = run_batch(manifest, tmp_path / "there", executor=Murderous(executor, deadly))
    assert len(list(deadly.iterdir())) == 6
    assert [(row.name, row.status, row.error) for row in there.rows] == [
        (row.name, row.status, row.error) for row in here.rows
    ]
    assert tree(tmp_path / "there") == tree(tmp_path / "here")  # nothing is left of the first attempts


def tree(folder: Path) -> dict[Path, bytes | None]:
    """All that is there."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_job_that_kills_its_workers_is_a_failure_among_others(
    executor: Ray, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coremerge.executors.ray.RETRIES", 0)
    manifest = Manifest.model_validate({"sets": {"one": [str(sources[0])], "two": [str(sources[1])]}})
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / "two default").touch()
    report = run_batch(manifest, tmp_path / "OUT", executor=Murderous(executor, marks))
    assert [row.status for row in report.rows] == ["failed", "done"]
    assert "lost a part of the work 1 times" in str(report.rows[0].error)
    assert [path.name for path in (tmp_path / "OUT").iterdir()] == ["two"]


def test_a_cluster_without_gpus_says_so(executor: Ray) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        Ray(gpus=1)
    assert ray.is_initialized()  # it was not this one's to stop


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[ray\]"):
        Ray()


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        _knocked("127.0.0.1:9")


def _knocked(address: str) -> None:
    from coremerge.executors import ray as module

    module._start(ray, address)
