"""What a fit's settings change: ``python -m benchmarks.accuracy.fit_settings --tasks examples/vision``.

On validation rows, one setting at a time around the defaults; of some of a world's adapters, one draw of them and of
their inputs. Test rows are not looked at. Nothing here knows a world's name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import results
from benchmarks.accuracy.work import EXAMPLE, bench_of
from benchmarks.accuracy.worlds import Cell, chosen_of, mean
from coremerge.learning import leastsquares
from coremerge.learning.beyond import BEYOND
from coremerge.learning.fit import RIDGE

SETTINGS: Mapping[str, Sequence[float]] = {
    "beyond": (0, 64, 256),
    "ridge": (0.01, 0.03, 0.3, 1.0),
    "least": (0.0, 0.05, 1.0),
    "aside": (0.03, 1.0),
}
"""Beside the defaults; ``least`` is :data:`coremerge.learning.leastsquares.LEAST`."""
DEFAULTS: Mapping[str, float] = {
    "beyond": BEYOND, "ridge": RIDGE, "least": leastsquares.LEAST, "aside": leastsquares.ASIDE,
}  # fmt: skip
OLD: Mapping[str, float] = {"beyond": 0, "ridge": 0.3, "least": 0.0}
"""As far as a fit was before it read directions beyond the adapters' rows."""


@dataclass(frozen=True)
class Variant:
    """Settings that are not the defaults."""

    changed: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.changed.items()) or "the defaults"

    def row(self, cell: Cell) -> dict[str, Any]:
        """Its scores on validation rows."""
        settings: dict[str, Any] = {**DEFAULTS, **self.changed}
        least, beyond = settings.pop("least"), int(settings.pop("beyond"))
        start = time.perf_counter()
        with patch.object(leastsquares, "LEAST", least):
            updates = cell.fitted(beyond=beyond, **settings)
        seconds = time.perf_counter() - start
        scores = cell.bench.evaluator.score(updates, "validation")
        return {"mean": mean(scores), "normalised": dict(scores.normalised), "seconds": round(seconds, 1)}


def variants(only: Sequence[str] = ()) -> Iterator[Variant]:
    """The defaults first."""
    yield Variant({})
    yield Variant(OLD)
    for name, values in SETTINGS.items():
        if not only or name in only:
            yield from (Variant({name: value}) for value in values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=Path, default=EXAMPLE, help="folder of the task set")
    parser.add_argument("--rows", type=int, default=100, help="validation rows a task, at most")
    parser.add_argument("--count", type=int, default=4, help="adapters")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of adapters and inputs")
    parser.add_argument("--only", action="append", default=[], choices=SETTINGS, help="this setting; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few inputs; results go to the work folder")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    if min(given.rows, given.count) < 1:
        parser.error("rows and adapters are counted from 1 on")
    bench = bench_of(parser, given.tasks, {"validation": given.rows, "test": given.rows})
    names = list(bench.adapters)
    cell = Cell(bench.only(chosen_of(names, min(given.count, len(names)), given.seed)), given.seed, given.quick)
    found: dict[str, dict[str, Any]] = {}
    for variant in variants(given.only):
        found[str(variant)] = row = variant.row(cell)
        print(variant, f"{row['mean']:.3f}", f"{row['seconds']} s", flush=True)
    lines = [[name, row["mean"], min(row["normalised"].values()), row["seconds"]] for name, row in found.items()]
    body = (
        f"Adapters of {', '.join(cell.bench.adapters)}; 64 inputs a task; normalised scores on up to {given.rows}"
        " validation rows a task.\n\n" + results.table(["settings", "mean", "worst task", "seconds"], lines)
    )
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    section = f"Accuracy: settings of a fit: {bench.taskset.name}, {len(cell.bench.adapters)} adapters"
    results.write(section, body, found, seed=given.seed, folder=folder)


if __name__ == "__main__":
    main()
