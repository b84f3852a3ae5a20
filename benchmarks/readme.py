"""The tables in README and docs, written anew from results.json: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.accuracy.work import kind_of
from benchmarks.accuracy.worlds import rows_of
from coremerge.evaluation.taskset import read_taskset

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODULE, TOOLS = "Speed: one module", "Speed: beside other tools"
PAPER = "Scale: cost on paper"
WORLDS = {"minilm-wordnet": "text", "vision": "vision", "generation": "generation", "vlm": "vision-language"}
"""Task set → heading."""

MERGES = {
    "no adapter": "no adapter",
    "no adapter, probes": "no adapter, probes",
    "task arithmetic": "core task arithmetic",
    "task arithmetic at 2.4 / T": "task arithmetic at the start of learned weights",
    "TIES, full space": "full ties",
    "KnOTS-TIES": "knots ties",
    "core TIES": "core ties",
    "CART": "core cart",
    "TSV": "core tsv",
    "Iso-C": "core sum + isotropize",
    "core TSV + Iso-C": "core tsv + isotropize",
    "coremerge's default": "core coremerge's default",
    "the same with `--scale base`": "core coremerge's default, scale by the base",
}
LEARNED = {
    "weights by NSC, its paper's settings": "weights: nsc",
    "weights by `nsc-own`": "weights: nsc-own",
    "weights by `match`": "weights: match",
    "weights by entropy, classification alone": "weights: entropy (AdaMerging; classification alone)",
    "`coremerge fit`": "fit",
    "`coremerge fit --rank 16`": "fit, rank 16",
}
"""From 64 unlabelled inputs a task."""

WAYS = {"dense TSV": "dense TSV", "KnOTS, dense SVD of m×Tn": "KnOTS, its dense SVD alone", "PEFT svd": "PEFT `svd`"}
TOOLS_SHOWN = {
    "floor": ("import torch, read, write: the floor", "all"),
    "coremerge merge": ("`coremerge merge`", "all"),
    "PEFT cat": ("PEFT `cat`: a sum, without the base's weights", "all"),
    "mergekit, task arithmetic": ("mergekit: a sum, into a base", "1 of 32"),
}
MODULES = {"1024": 64, "4096": 64}
"""Llama-3-8B: so many modules with so many outputs."""

Known = Mapping[str, Any]


def accuracy(known: Known) -> str:
    """Each way as it comes and tuned, a column a world."""
    shown = {name: known[f"Accuracy: {folder}"]["numbers"] for folder, name in WORLDS.items()}
    rows = [
        [name, *(_cell(numbers, label) for numbers in shown.values())] for name, label in {**MERGES, **LEARNED}.items()
    ]
    return results.table(["merge", *shown], [row for row in rows if any(row[1:])])


def _cell(numbers: Known, label: str) -> str:
    return " · ".join(f"{value:.3f}" for value in means(numbers, label) if not math.isnan(value))


def means(numbers: Known, label: str, count: str = "all", draws: Collection[str] | None = None) -> tuple[float, float]:
    """The mean over draws of ``count`` adapters merged, untuned and tuned; NaN where that is not measured."""
    found = rows_of(numbers, count, label, draws)
    parts = [[row["mean"] for row in found], [row["tuned"]["mean"] for row in found if "tuned" in row]]
    plain, tuned = (statistics.fmean(values) if values else math.nan for values in parts)
    return plain, tuned


def kinds(known: Known) -> str:
    """Each way as it comes, a column for each world's kinds of tasks; mean over tasks, then draws."""
    columns: dict[str, tuple[Known, list[str]]] = {}
    for folder, world in WORLDS.items():
        tasks = read_taskset(EXAMPLES / folder).tasks
        numbers = known[f"Accuracy: {folder}"]["numbers"]
        for kind in dict.fromkeys(map(kind_of, tasks.values())):
            named = [name for name, task in tasks.items() if kind_of(task) == kind]
            columns[f"{world}: {SPOKEN.get(kind, kind)}"] = numbers, named
    rows = [
        [name, *(_part(numbers, label, tasks) for numbers, tasks in columns.values())]
        for name, label in {**MERGES, **LEARNED}.items()
    ]
    return results.table(["merge", *columns], [row for row in rows if any(row[1:])])


SPOKEN = {"dense": "maps", "generation": "answers", "choice": "judgements"}
"""Kind of a task → heading."""


def _part(numbers: Known, label: str, tasks: Sequence[str]) -> str:
    found = rows_of(numbers, "all", label)
    each = [statistics.fmean(max(0.0, row["normalised"][task]) for task in tasks) for row in found]
    return f"{statistics.fmean(each):.3f}" if each else ""


def speed(known: Known) -> str:
    """Whole processes of this tool and others, then what is extrapolated."""
    rows: list[list[object]] = []
    for label, (name, layers) in TOOLS_SHOWN.items():
        usages = known[TOOLS]["numbers"][f"llama-3-8b: {label}"]
        seconds, peak = (statistics.median(usage[key] for usage in usages) for key in ("wall", "peak"))
        rows.append([name, layers, f"{seconds:.1f} s", f"{peak / 1e9:.2f} GB"])
    for way, name in WAYS.items():
        total = sum(
            row["seconds"] * MODULES[str(row["size"][0])] for row in known[MODULE]["numbers"] if row["way"] == way
        )
        rows.append([name, "all, extrapolated from one module of each size", f"{total / 60:,.0f} min", ""])
    return results.table(["Llama-3-8B's shapes, six adapters of rank 16", "layers", "time", "memory"], rows)


def paper(known: Known) -> str:
    """What was not run, by the cost model."""
    rows: list[list[object]] = []
    for label, modules, read, written, operations, hours, handing, workers, peak in known[PAPER]["numbers"]:
        sizes = [f"{modules:,}", f"{read:,.0f}", f"{written:,.0f}", f"{operations:.1e}"]
        rows.append([label, *sizes, f"{hours:,.2f}", f"{handing:,.3f}", f"{workers:,}", f"{peak:.1f}"])
    head = ["merge", "modules", "GB read", "GB written", "operations", "processor h", "handing out, h", "workers", "GB"]
    return results.table(head, rows)


TABLES: Mapping[str, Mapping[str, Callable[[Known], str]]] = {
    "README.md": {"accuracy": accuracy, "speed": speed},
    "docs/scaling.md": {"paper": paper},
    "docs/evidence.md": {"kinds": kinds},
}


def filled(text: str, known: Known, tables: Mapping[str, Callable[[Known], str]]) -> str:
    """A page with its tables as they are now.

    Raises:
        ValueError: a table's place is not marked.
    """
    for name, make in tables.items():
        marks = re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*?(\n<!-- {name}: end -->)", re.DOTALL)
        if len(marks.findall(text)) != 1:
            raise ValueError(f"{name}: begin and end are not marked once")
        text = marks.sub(rf"\1\n{make(known)}\n\2", text)
    return text


def main() -> None:
    known = json.loads((results.ROOT / "results.json").read_text())
    for name, tables in TABLES.items():
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), known, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
