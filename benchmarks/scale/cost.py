"""How well the cost of a merge is told beforehand: ``python -m benchmarks.scale.cost``.

Merges of many sizes, from files to files, on one thread: the constants of :mod:`coremerge.cost` are what fits their
processor times best, and whole processes of other shapes are held against what the constants say.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks import results
from benchmarks.speed import shapes
from benchmarks.speed.process import measure
from benchmarks.speed.run import RECIPE, merge_command, remove
from benchmarks.speed.scaling import square
from benchmarks.speed.shapes import SHAPES, Shape
from coremerge import Adapter, LowRank, cost
from coremerge.adapter import Module
from coremerge.cost import Cost, cost_of
from coremerge.executors.local import default_threads
from coremerge.pipeline import merge_files, prepare
from coremerge.plan import make_plan

FITTED = [
    square(width, layers, adapters, rank)
    for width, layers, adapters, rank in (
        (128, 256, 4, 8), (512, 64, 4, 8), (1024, 32, 2, 16), (1024, 32, 8, 16), (2048, 16, 4, 32), (2048, 16, 16, 8),
        (4096, 8, 4, 8), (4096, 8, 8, 16), (4096, 4, 8, 64), (8192, 8, 2, 16), (8192, 4, 8, 16), (16384, 4, 4, 16),
    )
]  # fmt: skip
"""What the constants are fitted to."""

HELD = [
    replace(SHAPES["vit-b"], layers=12),
    replace(SHAPES["llama-3-8b"], layers=4),
    SHAPES["llama-3-8b"],
    replace(SHAPES["llama-3-8b"], layers=8, adapters=16, rank=32),
    replace(SHAPES["llama-70b"], layers=8),
    replace(SHAPES["llama-405b"], layers=8),
    replace(SHAPES["llama-405b"], layers=4, adapters=16, rank=32),
    replace(SHAPES["experts"], layers=8),
]
"""What they are checked on: whole processes, all processors."""


def taken(folders: Sequence[Path], out: Path, repeats: int) -> float:
    """Processor seconds of a merge, the median."""
    times = []
    for _ in range(repeats):
        remove(out)
        start = time.process_time()
        merge_files(folders, out, RECIPE, threads=1)
        times.append(time.process_time() - start)
    remove(out)
    return statistics.median(times)


def parts(one: Cost) -> list[float]:
    """What the constants multiply: of tall factors, of cores, of bytes, of modules."""
    return [one.tall, one.core, 2 * one.read + one.written, one.modules]


def fitted(listed: Sequence[Shape], work: Path, repeats: int) -> tuple[str, object]:
    """The constants, and how far off they are where they were fitted."""
    rows, costs, times = [], [], []
    for shape in listed:
        folders = shapes.make(shape, work)
        one = prepare(folders, RECIPE).cost
        seconds = taken(folders, work / "out", repeats)
        shutil.rmtree(work / shape.key)
        costs.append(parts(one))
        times.append(seconds)
        rows.append([_named(shape), one.modules, one.operations, one.read / 1e6, seconds])
        print(rows[-1], flush=True)
    weighted = np.array(costs) / np.array(times)[:, None]  # relative errors count
    size = np.linalg.norm(weighted, axis=0)
    found = nnls(weighted / size, np.ones(len(times)))[0] / size
    told = np.array(costs) @ found
    for row, seconds in zip(rows, told, strict=True):
        row += [float(seconds), float(seconds / row[4])]
    names = ["TALL", "CORE", "BYTE", "MODULE"]
    used = [getattr(cost, name) for name in names]
    constants = [[n, float(f), u] for n, f, u in zip(names, found, used, strict=True)]
    head = ["merge", "modules", "operations", "MB read", "processor s", "told s", "told / taken"]
    return (
        f"tsv + isotropize, exact rank, from files to files on one thread, processor seconds, medians of {repeats}."
        " The constants minimise relative errors.\n\n" + results.table(["constant", "fitted", "in use"], constants)
        + "\n\n" + results.table(head, rows),
        {"constants": constants, "merges": rows},
    )  # fmt: skip


def checked(listed: Sequence[Shape], work: Path, repeats: int) -> tuple[str, object]:
    """Whole processes beside what is told."""
    rows = []
    for shape in listed:
        folders, out = shapes.make(shape, work), work / "out"
        prepared = prepare(folders, RECIPE)
        used = []
        for _ in range(repeats):
            remove(out)
            used.append(measure(merge_command(folders, out)))
        remove(out)
        shutil.rmtree(work / shape.key)
        wall, peak = statistics.median(u.wall for u in used), max(u.peak for u in used)
        told, most = prepared.cost.seconds(default_threads()), prepared.peak_bytes()
        size = [prepared.cost.modules, prepared.cost.operations, prepared.cost.read / 1e6]
        rows.append([_named(shape), *size, wall, told, told / wall, round(peak / 1e6), round(most / 1e6)])
        print(rows[-1], flush=True)
    head = [
        "merge",
        "modules",
        "operations",
        "MB read",
        "wall s",
        "told s",
        "told / wall",
        "peak MB",
        "told at most MB",
    ]
    return (
        f"What `coremerge merge --dry-run` tells, beside whole processes on all processors, medians of {repeats};"
        " none of these shapes was used for the constants.\n\n" + results.table(head, rows),
        rows,
    )  # fmt: skip


def on_paper() -> tuple[str, object]:
    """What nobody ran here."""
    large = replace(SHAPES["llama-405b"], adapters=64)
    experts = replace(SHAPES["experts"], layers=240, adapters=8)
    many = SHAPES["llama-3-8b"]
    listed = [
        ("405B, T = 64, r = 16, cut to rank 64", large, {"rank": 64}, 1),
        ("405B, T = 64, r = 16, exact rank", large, {}, 1),
        ("671B mixture, T = 8, r = 8, exact rank", experts, {}, 1),
        ("10,000 merges of llama-3-8b, T = 6, r = 16", many, {}, 10_000),
    ]
    rows = []
    for label, shape, changes, times in listed:
        recipe = RECIPE.model_copy(update=changes)
        plan = make_plan([_announced(shape, i) for i in range(shape.adapters)], recipe)
        one = cost_of(plan)
        hours = [times * one.processor_seconds / 3600, times * one.handed / 3600]
        most = max(1, round(one.processor_seconds / one.handed)) if times == 1 else times
        size = [times * one.modules, times * 2 * one.read / 1e9, times * one.written / 1e9]
        rows.append([label, *size, times * one.operations, *hours, most, plan.peak_bytes(1) / 1e9])
    head = [
        "merge",
        "modules",
        "GB read",
        "GB written",
        "operations",
        "processor hours",
        "handing out, h",
        "workers",
        "GB each",
    ]
    return (
        "By the constants in use; workers: as many as shorten it, before the one process that hands out the work and"
        " writes is the slower part. Many merges have one such process each.\n\n" + results.table(head, rows),
        rows,
    )


def _announced(shape: Shape, index: int) -> Adapter:
    """An adapter that has no numbers."""
    modules = {name: Module(size, shape.rank, dtype=torch.bfloat16) for name, size in shape.shapes()}
    return Adapter(modules, lambda name: LowRank.zeros(*modules[name].shape), name=str(index))


def _named(shape: Shape) -> str:
    (m, n), *_ = shape.modules.values()
    size = f"{m} × {n}" if shape.name == "square" else shape.name
    return f"{size}, {shape.layers} layers, T = {shape.adapters}, r = {shape.rank}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results go to the work folder")
    parser.add_argument("--only", choices=("fit", "check", "paper"), help="one of the parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="for the adapters that are made")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (given.work if given.quick else results.ROOT)
    tiny = [square(64, k, 2 + k, 4) for k in (1, 2, 3, 4, 5)]
    if given.only in (None, "paper"):
        results.write("Scale: cost on paper", *on_paper(), seed=0, folder=folder)
    if given.only in (None, "fit"):
        body = fitted(tiny if given.quick else FITTED, given.work, given.repeats)
        results.write("Scale: constants of the cost", *body, seed=0, folder=folder)
    if given.only in (None, "check"):
        body = checked([SHAPES["tiny"]] if given.quick else HELD, given.work, given.repeats)
        results.write("Scale: cost told and taken", *body, seed=0, folder=folder)


if __name__ == "__main__":
    main()
