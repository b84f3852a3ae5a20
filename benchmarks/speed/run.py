"""How fast a merge is, side by side with its floor, dense ways and PEFT: ``python -m benchmarks.speed.run``.

By default on adapters of Llama-3-8B's shapes. ``--quick``: tiny ones, to see that it runs. ``--full``: dense ways are
timed whole, not extrapolated from one SVD, and everything is repeated more often.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.speed import dense, others, shapes, stand_in
from benchmarks.speed.process import Usage, alternate, median
from benchmarks.speed.shapes import SHAPES, Shape
from coremerge import Adapter, LowRank, Recipe, merge
from coremerge.executors import local

RECIPE = Recipe(space="core", method="tsv", steps=["isotropize"], rank="exact")
SIDE_BY_SIDE = 16
"""Modules that are timed together, as a merge has them."""

OPTIONS = ["--space", "core", "--method", "tsv", "--step", "isotropize", "--rank", "exact"]


@dataclass(frozen=True)
class Settings:
    """What to run: the set, the repeats, whether dense ways are timed whole, and where files go."""

    shape: Shape
    repeats: int
    whole: bool
    work: Path


Part = Callable[[Settings], tuple[str, object]]
"""Measures something: the text of its section, and the raw numbers."""


def merge_command(folders: list[Path], out: Path, *options: str) -> list[str | Path]:
    """``coremerge merge`` as a process of its own."""
    return [*default_command(folders, out), *OPTIONS, *options]


def default_command(folders: list[Path], out: Path, *options: str) -> list[str | Path]:
    """The same with no other method than its own."""
    return [Path(sys.executable).with_name("coremerge"), "merge", *folders, "-o", out, "-q", *options]


def whole_command(settings: Settings, device: str = "cpu") -> tuple[str, object]:
    """The floor and the command by turns."""
    folders = shapes.make(settings.shape, settings.work)
    out = settings.work / "out"
    on = [] if device == "cpu" else ["--device", device]
    commands: dict[str, list[str | Path]] = {
        "floor": [sys.executable, Path(__file__).with_name("floor.py"), out, *shapes.files(folders)],
        "coremerge merge": merge_command(folders, out, *on),
        "coremerge merge, its default": default_command(folders, out, *on),
    }
    taken = alternate(commands, settings.repeats, lambda: remove(out))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) if out.is_dir() else 0
    remove(out)
    floor = median(taken["floor"])
    rows = [[name, *_usage_row(median(usages), floor), _spread(usages)] for name, usages in taken.items()]
    read = sum(file.stat().st_size for file in shapes.files(folders))
    text = results.table(["process", "wall s", "× floor", "processor s", "peak MB", "wall s, lowest to highest"], rows)
    return (
        f"{_described(settings.shape)}: {read / 1e6:.0f} MB in, {size / 1e6:.0f} MB out, inputs in the page cache."
        " tsv + isotropize in core space, scale auto, rank exact; the default reads the factors once more, for their"
        f" norms. Medians of {settings.repeats} runs, by turns."
        " The floor imports torch, reads the inputs' bytes and writes as many; both write to a fresh file and call"
        f" fsync.\n\n{text}",
        {name: [asdict(usage) for usage in usages] for name, usages in taken.items()},
    )


def _usage_row(usage: Usage, floor: Usage) -> tuple[float, float, float, int]:
    return usage.wall, usage.wall / floor.wall, usage.cpu, round(usage.peak / 1e6)


def _spread(usages: list[Usage]) -> str:
    walls = [usage.wall for usage in usages]
    return f"{min(walls):.2f}–{max(walls):.2f}"


def _described(shape: Shape) -> str:
    modules = ", ".join(f"{name.rsplit('.', 1)[-1]} {m}×{n}" for name, (m, n) in shape.modules.items())
    return (
        f"Shapes of {shape.name}: {shape.layers} layers ({modules}), T = {shape.adapters}, r = {shape.rank},"
        f" {shape.dtype}"
    )


def remove(path: Path) -> None:
    """Whatever is at ``path``."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def per_module(settings: Settings) -> tuple[str, object]:
    """One module of each size: this tool, dense ways, PEFT."""
    shape = settings.shape
    sizes = sorted({size for _, size in shape.shapes()})
    rows = [row for size in sizes for row in _one_size(settings, size)]
    counts = {size: sum(s == size for _, s in shape.shapes()) for size in sizes}
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = [[f"{r.size[0]}×{r.size[1]}", r.way, r.seconds, r.seconds / _ours(rows, r.size), r.how] for r in rows]
    totals = [[way, sum(counts[r.size] * r.seconds for r in rows if r.way == way)] for way in ways]
    return (
        f"T = {shape.adapters}, r = {shape.rank}. coremerge: project, TSV, isotropize and lift in float64; the"
        f" others in float32. All on {torch.get_num_threads()} cores, unless said otherwise, and from factors or"
        " updates in memory. PEFT's svd and cat merge by weighted sum only (svd: then cut to rank r).\n\n"
        + results.table(["module", "way", "s", "× coremerge", "measured"], lines)
        + f"\n\nAll {sum(counts.values())} modules, extrapolated from the table above (module by module, times their"
        " number):\n\n" + results.table(["way", "s"], totals),
        [asdict(row) for row in rows],
    )


@dataclass(frozen=True)
class Row:
    """One way to merge one module."""

    size: tuple[int, int]
    way: str
    seconds: float
    how: str


def _ours(rows: list[Row], size: tuple[int, int]) -> float:
    return next(row.seconds for row in rows if row.size == size and row.way == "coremerge")


def _one_size(settings: Settings, size: tuple[int, int]) -> list[Row]:
    made = [shapes.factors(settings.shape, size, i, 0) for i in range(settings.shape.adapters)]
    ours = statistics.median(timed(lambda: merge_module(made)) for _ in range(4 * settings.repeats))
    many = statistics.median(timed(lambda: merge_many(made)) / SIDE_BY_SIDE for _ in range(settings.repeats))
    rows = [
        Row(size, "coremerge", many, f"{SIDE_BY_SIDE} side by side, over {SIDE_BY_SIDE}; median of {settings.repeats}"),
        Row(size, "coremerge, one alone, one thread", ours, f"median of {4 * settings.repeats}"),
    ]
    return rows + _dense_rows(settings, size, [b @ a for a, b in made]) + _peft_rows(settings, size)


def _dense_rows(settings: Settings, size: tuple[int, int], updates: list[torch.Tensor]) -> list[Row]:
    """Small ones several times, large ones once, and TSV from one of its SVDs unless it is to be timed whole."""
    small = min(size) <= 1024
    count, how = (settings.repeats, f"median of {settings.repeats}") if small else (1, "once")

    def often(work: Callable[[], object]) -> float:
        return statistics.median(timed(work) for _ in range(count))

    if settings.whole or small:
        tsv = Row(size, "dense TSV", often(lambda: dense.tsv(updates)), f"whole, {how}")
    else:
        one = timed(lambda: dense.svd(updates[0]))
        tsv = Row(size, "dense TSV", (len(updates) + 2) * one, f"one {size[0]}×{size[1]} SVD, × (T + 2)")
    flat = Row(size, "dense Iso-C", often(lambda: dense.iso_c(updates)), f"whole, {how}")
    return [
        tsv,
        flat,
        Row(size, "KnOTS, dense SVD of m×Tn", often(lambda: dense.knots_basis(updates)), f"its SVD, {how}"),
    ]


def _peft_rows(settings: Settings, size: tuple[int, int]) -> list[Row]:
    try:
        import peft  # noqa: F401
    except ImportError:
        return []
    module = next(name for name, s in settings.shape.modules.items() if s == size)
    folders = shapes.make(settings.shape, settings.work)
    one = replace(settings.shape, layers=1, modules={module: size})
    few = replace(one, layers=min(2, settings.shape.layers))
    return [
        Row(size, "PEFT svd", stand_in.seconds(one, folders, "svd"), "stand-in of 1 layer, once"),
        Row(
            size,
            "PEFT cat",
            statistics.median(stand_in.seconds(few, folders, "cat") for _ in range(3)) / few.layers,
            f"stand-in of {few.layers} layers, median of 3",
        ),
    ]


def merge_module(made: list[tuple[torch.Tensor, torch.Tensor]]) -> LowRank:
    """The whole of one module, from factors in memory."""
    updates = [LowRank(b.double(), a.double()) for a, b in made]
    adapters = [Adapter.from_updates({"module": update}, name=str(i)) for i, update in enumerate(updates)]
    return merge(adapters, RECIPE, threads=1).adapter["module"]


def merge_many(made: list[tuple[torch.Tensor, torch.Tensor]], count: int = SIDE_BY_SIDE) -> None:
    """As many modules, on all cores."""
    names = [f"module{i}" for i in range(count)]
    adapters = [
        Adapter.from_updates({name: LowRank(b.double(), a.double()) for name in names}, name=str(i))
        for i, (a, b) in enumerate(made)
    ]
    merged = merge(adapters, RECIPE).adapter
    for _ in local.run(merged.__getitem__, names):
        pass


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _other(shape: Shape) -> Shape:
    return shape if shape.name == "tiny" else SHAPES["vit-b"]


def gpu(settings: Settings) -> tuple[str, object]:
    """The whole command with ``--device cuda``, where there is such a device."""
    if not torch.cuda.is_available():
        return "Not run: this machine has no CUDA device.", None
    return whole_command(settings, "cuda")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny adapters; results go to the work folder")
    parser.add_argument("--full", action="store_true", help="dense ways timed whole; more repeats")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="for the adapters that are made")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    parts: dict[str, Part] = {
        "the whole command": whole_command,
        "one module": per_module,
        "one module, vit-b": lambda given: per_module(replace(given, shape=_other(given.shape))),
        "beside other tools": others.compare,
        "on a GPU": gpu,
    }
    parser.add_argument("--only", choices=parts)
    given = parser.parse_args(arguments)
    shape = SHAPES["tiny" if given.quick else given.shape]
    repeats = given.repeats or (1 if given.quick else 9 if given.full else 5)
    settings = Settings(shape, repeats, given.full or given.quick, given.work)
    folder = given.results or (given.work if given.quick else results.ROOT)
    for title, part in ((given.only, parts[given.only]),) if given.only else parts.items():
        body, raw = part(settings)
        about = "" if given.shape == SHAPES["llama-3-8b"].name else f", {shape.name}"
        results.write(f"Speed: {title}{about}", body, raw, seed=shape.seed, folder=folder)


if __name__ == "__main__":
    main()
