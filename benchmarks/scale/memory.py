"""Memory against the number of layers: ``python -m benchmarks.scale.memory``.

Whole ``coremerge merge`` processes on adapters shaped like known models, with more and more of their layers: what they
hold at most must not grow with them.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks import results
from benchmarks.speed import shapes
from benchmarks.speed.process import measure
from benchmarks.speed.run import merge_command, remove
from benchmarks.speed.shapes import SHAPES, Shape

LAYERS = {"llama-3-8b": (8, 32, 128), "llama-70b": (5, 20, 80), "llama-405b": (4, 16, 32), "experts": (1, 8, 32)}
"""Shape → its layers, few to many; the last ones are its own, or as many as this machine's disk has patience for."""


def sizes(name: str, quick: bool) -> list[Shape]:
    """The same shape with more and more layers."""
    shape = replace(SHAPES["tiny"] if quick else SHAPES[name], adapters=3 if quick else 4)
    return [replace(shape, layers=layers) for layers in ((1, 4) if quick else LAYERS[name])]


def memory(names: list[str], work: Path, quick: bool) -> tuple[str, object]:
    """Peaks."""
    rows: list[list[object]] = []
    for name in names:
        first = 0
        for shape in sizes(name, quick):
            folders, out = shapes.make(shape, work), work / "out"
            remove(out)
            used = measure(merge_command(folders, out))
            read, written = (sum(f.stat().st_size for f in files) for files in (shapes.files(folders), out.iterdir()))
            remove(out)
            shutil.rmtree(work / shape.key)
            first = first or used.peak
            count = shape.layers * len(shape.modules)
            rows.append(
                [
                    name,
                    shape.layers,
                    count,
                    read / 1e9,
                    written / 1e9,
                    used.wall,
                    round(used.peak / 1e6),
                    used.peak / first,
                ]
            )
            print(rows[-1], flush=True)
    head = ["shape", "layers", "modules", "GB read", "GB written", "wall s", "peak MB", "× the fewest layers'"]
    return (
        "tsv + isotropize in core space, exact rank, T = 4, bfloat16, two threads; whole processes, one run each.\n\n"
        + results.table(head, rows),
        rows,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results go to the work folder")
    parser.add_argument("--only", choices=LAYERS, help="one shape")
    parser.add_argument("--work", type=Path, default=Path("work/bench"), help="for the adapters that are made")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    folder = given.results or (given.work if given.quick else results.ROOT)
    names = [given.only] if given.only else ["tiny"] if given.quick else list(LAYERS)
    results.write("Scale: memory against layers", *memory(names, given.work, given.quick), seed=0, folder=folder)


if __name__ == "__main__":
    main()
