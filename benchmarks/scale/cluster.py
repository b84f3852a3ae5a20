"""What a Ray cluster costs and gains: ``python -m benchmarks.scale.cluster``.

On one machine the nodes share its processors, so that merges can gain no more than it has; what grows with the number
of workers is shown with parts that only wait.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks import results
from benchmarks.speed import shapes
from benchmarks.speed.run import RECIPE, remove
from benchmarks.speed.scaling import square
from benchmarks.speed.shapes import SHAPES, Shape
from coremerge.batch import run_batch
from coremerge.executors import Executor
from coremerge.executors.ray import Ray
from coremerge.manifest import Manifest
from coremerge.pipeline import merge_files

WAIT = 0.05
"""Seconds that a part waits."""


@contextmanager
def cluster(nodes: int, processors: int = 1) -> Iterator[Ray]:
    """A cluster of that many nodes on this machine, each with as many workers as ``processors``; the workers are up."""
    os.environ.update({"RAY_worker_niceness": "0"})  # by default workers give way to all else on the machine
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": processors, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            started.add_node(num_cpus=processors)
        with Ray(started.address) as made:
            list(made.run(_load, range(8 * made.workers), lambda _: 1.0, lambda x: x))
            yield made
    finally:
        ray.shutdown()
        started.shutdown()


def _load(_: int) -> None:
    import coremerge.remote

    assert coremerge.remote
    time.sleep(WAIT)


def seconds(folders: list[Path], out: Path, threads: int, executor: Executor | None, repeats: int) -> float:
    """By the clock, of the fastest of several merges: the first one opens the files in the workers."""
    best = float("inf")
    for _ in range(repeats + 1):
        remove(out)
        start = time.perf_counter()
        merge_files(folders, out, RECIPE, threads=threads, executor=executor)
        best = min(best, time.perf_counter() - start)
    return best


def merges(listed: list[tuple[str, Shape]], workers: list[int], work: Path, repeats: int) -> tuple[str, object]:
    """The same merge by threads of one process and by workers of a cluster."""
    rows: list[list[Any]] = []
    made = {label: shapes.make(shape, work) for label, shape in listed}
    count = {label: shape.layers * len(shape.modules) for label, shape in listed}
    alone = {}
    for label, folders in made.items():
        for n in workers:
            alone[label, n] = seconds(folders, work / "out", n, None, repeats)
            (content,) = (work / "out").glob("*.safetensors")
            alone[label, "bytes"] = content.read_bytes()
    for n in workers:
        with cluster(n) as executor:
            for label, folders in made.items():
                taken = seconds(folders, work / "out", 1, executor, repeats)
                (content,) = (work / "out").glob("*.safetensors")
                same = content.read_bytes() == alone[label, "bytes"]
                here, one = alone[label, n], alone[label, 1]
                extra = 1000 * (taken - here) / count[label]
                rows.append([label, count[label], n, here, taken, extra, one / taken, "yes" if same else "NO"])
                print(rows[-1], flush=True)
    for label, shape in listed:
        shutil.rmtree(work / shape.key)
        assert label in made
    remove(work / "out")
    head = ["merge", "modules", "workers", "threads s", "cluster s", "more, ms a module", "× one thread", "same bytes"]
    return (
        "tsv + isotropize, from files to files, in a process that is warm; as many threads, and as many nodes with one"
        f" worker each, on one machine; the fastest of {repeats}.\n\n" + results.table(head, rows),
        rows,
    )


def many(shape: Shape, jobs: int, workers: list[int], work: Path) -> tuple[str, object]:
    """A batch of merges, in one process and on a cluster."""
    folders, out = shapes.make(shape, work), work / "out"
    recipes = {f"r{i}": {"merge_method": "tsv", "steps": ["isotropize"], "scale": 1 + i / jobs} for i in range(jobs)}
    manifest = Manifest(sets={"all": list(map(str, folders))}, recipes=recipes, folder=Path())

    def timed(executor: Executor | None) -> float:
        remove(out)
        start = time.perf_counter()
        report = run_batch(manifest, out, threads=1, executor=executor)
        assert not report.failed, report.failed[0].error
        return time.perf_counter() - start

    rows: list[list[Any]] = [["this process, one thread", timed(None)]]
    for n in workers:
        with cluster(n) as executor:
            timed(executor)  # workers open what they need
            rows.append([f"{n} worker{'s' if n > 1 else ''}", timed(executor)])
    alone = rows[0][1]
    rows = [[label, taken, taken / jobs, 3600 * jobs / taken, alone / taken] for label, taken in rows]
    for row in rows:
        print(row, flush=True)
    remove(out)
    shutil.rmtree(work / shape.key)
    modules = shape.layers * len(shape.modules)
    return (
        f"`coremerge batch`: {jobs} recipes (tsv + isotropize) on {shape.adapters} adapters of {shape.name},"
        f" {modules} modules, on one machine.\n\n"
        + results.table(["by", "s", "s a merge", "merges an hour", "× one process"], rows),
        rows,
    )


def waiting(workers: list[int], parts: int) -> tuple[str, object]:
    """Parts that only wait: what handing out costs."""
    rows = []
    for n in workers:
        with cluster(min(n, 4), max(1, n // 4)) as executor:
            items = range(parts * executor.workers)
            start = time.perf_counter()
            list(executor.run(_load, items, lambda _: 1.0, lambda x: x))
            taken = time.perf_counter() - start
            ideal = WAIT * parts
            rows.append([executor.workers, len(items), taken, ideal, ideal / taken])
            print(rows[-1], flush=True)
    head = ["workers", "parts", "s", "s without any cost", "efficiency"]
    return (
        f"Parts that wait {1000 * WAIT:.0f} ms, {parts} for each worker; the workers of up to four nodes share this"
        " machine's processors.\n\n" + results.table(head, rows),
        rows,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results go to the work folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="for the adapters that are made")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (given.work if given.quick else results.ROOT)
    small = ("small modules", square(64, 64 if given.quick else 4096, 3, 4))
    listed = [small] if given.quick else [small, ("llama-3-8b", SHAPES["llama-3-8b"])]
    results.write("Scale: a cluster", *merges(listed, [1, 2], given.work, given.repeats), seed=0, folder=folder)
    shape, jobs = (SHAPES["tiny"], 4) if given.quick else (SHAPES["vit-b"], 40)
    results.write("Scale: many merges", *many(shape, jobs, [1, 2], given.work), seed=0, folder=folder)
    counts = [2] if given.quick else [1, 4, 16, 32]
    results.write("Scale: handing out work", *waiting(counts, 20), seed=0, folder=folder)


if __name__ == "__main__":
    main()
