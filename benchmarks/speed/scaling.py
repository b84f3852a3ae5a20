"""How the cost of a merge grows: ``python -m benchmarks.speed.scaling``.

In the width of the layers, the number of modules, the number of adapters and their rank, each alone, on one thread and
from memory; and a 70B-shaped set as a whole process. ``--quick``: tiny sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks import results
from benchmarks.speed import shapes
from benchmarks.speed.process import Usage, measure
from benchmarks.speed.run import RECIPE, merge_command, remove
from benchmarks.speed.shapes import SHAPES, Shape
from coremerge import Adapter, LowRank, merge
from coremerge.executors.local import single_threaded_torch


@dataclass(frozen=True)
class Sweep:
    """One quantity varied while the others stand still.

    Attributes:
        name: what varies.
        values: its values.
        shape: value → the set to merge.
        expected: the exponent that theory gives.
    """

    name: str
    values: Sequence[int]
    shape: Callable[[int], Shape]
    expected: str


def square(width: int, layers: int = 1, adapters: int = 6, rank: int = 16) -> Shape:
    """``layers`` square modules."""
    return Shape("square", layers, "layers.{layer}.{module}", {"proj": (width, width)}, adapters, rank)


def sweeps(quick: bool) -> list[Sweep]:
    """The four sweeps."""
    cut = 2 if quick else None
    width = 64 if quick else 4096
    return [
        Sweep("width m = n", [w * width // 4096 for w in (1024, 2048, 4096, 8192, 16384)][:cut], square, "1"),
        Sweep("modules", [8, 16, 32, 64, 128][:cut], lambda k: square(min(width, 1024), layers=k), "1"),
        Sweep("adapters T (r = 16)", [2, 4, 8, 16, 32][:cut], lambda t: square(width, adapters=t), "≤ 2"),
        Sweep("rank r (T = 6)", [8, 16, 32, 64][:cut], lambda r: square(width, rank=r), "≤ 2"),
    ]


def in_memory(shape: Shape) -> list[Adapter]:
    """The adapters of ``shape``, without files."""
    return [
        Adapter.from_updates(
            {
                name: LowRank(b.double(), a.double())
                for place, (name, size) in enumerate(shape.shapes())
                for a, b in [shapes.factors(shape, size, i, place)]
            },
            name=str(i),
        )
        for i in range(shape.adapters)
    ]


def merge_seconds(shape: Shape, repeats: int) -> float:
    """Median processor time of a whole merge on one thread, every module's factors asked for once."""
    adapters, taken = in_memory(shape), []
    with single_threaded_torch():
        for _ in range(repeats + 1):
            start = time.process_time()
            merged = merge(adapters, RECIPE, threads=1).adapter
            for name in merged:
                merged[name]
            taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x, least squares."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (statistics.fmean(column) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def growth(quick: bool, repeats: int) -> tuple[str, object]:
    """Each sweep's times and exponent."""
    tables, raw = [], {}
    for sweep in sweeps(quick):
        taken = [merge_seconds(sweep.shape(value), repeats) for value in sweep.values]
        raw[sweep.name] = dict(zip(map(str, sweep.values), taken, strict=True))
        ratios = [1.0, *(b / a for a, b in pairwise(taken))]
        rows = [
            [value, _total_rank(sweep.shape(value)), seconds, ratio]
            for value, seconds, ratio in zip(sweep.values, taken, ratios, strict=True)
        ]
        tables.append(
            f"{sweep.name}: exponent {exponent(sweep.values, taken):.2f} over all,"
            f" {exponent(sweep.values[-2:], taken[-2:]):.2f} over the last step; theory {sweep.expected}\n\n"
            + results.table([sweep.name, "R", "s", "× the row above"], rows)
        )
    return (
        "tsv + isotropize in core space, from memory, processor seconds of one thread, medians of"
        f" {repeats}. Exponents are slopes of log time over log size. The work is O((m + n) R²) with R = T · r, plus"
        " O(R³) for the cores, which shows once R nears the width, and a constant per module, which shows while R is"
        " small.\n\n" + "\n\n".join(tables),
        raw,
    )


def _total_rank(shape: Shape) -> int:
    return shape.adapters * shape.rank


def large(shape: Shape, repeats: int, work: Path) -> tuple[str, object]:
    """A large set as a whole process, and its floor."""
    folders, out = shapes.make(shape, work), work / "out"
    floor: list[str | Path] = [sys.executable, Path(__file__).with_name("floor.py"), out, *shapes.files(folders)]
    taken: dict[str, list[Usage]] = {"floor": [], "coremerge merge": []}
    for _ in range(repeats):
        for name, command in zip(taken, (floor, merge_command(folders, out)), strict=True):
            remove(out)
            taken[name].append(measure(command))
    remove(out)
    rows = [
        [name, statistics.median(u.wall for u in usages), statistics.median(u.cpu for u in usages), _peak(usages)]
        for name, usages in taken.items()
    ]
    size = sum(file.stat().st_size for file in shapes.files(folders))
    count = shape.layers * len(shape.modules)
    return (
        f"{count} modules in {shape.layers} layers, T = {shape.adapters}, r = {shape.rank}, {shape.dtype}:"
        f" {size / 1e9:.1f} GB in, as much out (rank exact). Whole processes, medians of {repeats}.\n\n"
        + results.table(["process", "wall s", "processor s", "peak MB"], rows),
        {name: [asdict(usage) for usage in usages] for name, usages in taken.items()},
    )


def _peak(usages: Sequence[Usage]) -> int:
    return round(max(usage.peak for usage in usages) / 1e6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results go to the work folder")
    parser.add_argument("--only", choices=("growth", "large"), help="one of the two parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="for the adapters that are made")
    parser.add_argument("--keep", action="store_true", help="keep the large set that was made")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (given.work if given.quick else results.ROOT)
    shape = SHAPES["tiny"] if given.quick else SHAPES["llama-70b"]
    if given.only != "large":
        results.write("Speed: how cost grows", *growth(given.quick, given.repeats), seed=shape.seed, folder=folder)
    if given.only != "growth":
        body, raw = large(shape, given.repeats, given.work)
        results.write("Speed: a 70B-shaped set", body, raw, seed=shape.seed, folder=folder)
        if not given.keep:
            remove(given.work / shape.key)


if __name__ == "__main__":
    main()
