"""What fitting cores costs: ``python -m benchmarks.speed.fit``.

Time and work of a fit beside one forward pass of the model over the same inputs, and the peak memory of whole processes
as inputs become more, with hidden states in memory and on disk. On a Llama of random weights. ``--quick``: a tiny one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.speed.learning import RANK, ROWS, TOKENS, make_adapters, make_batch, make_model
from benchmarks.speed.process import measure
from coremerge.learning import fit
from coremerge.learning.backbone import backbone_output

TASKS = 2
INPUTS = (8, 32, 128)
"""Of each task."""

Data = dict[str, list[dict[str, Tensor]]]


def make_data(count: int) -> Data:
    """Random tokens, ``count`` inputs of every task."""
    batches = count // ROWS
    return {f"task{k}": [make_batch(1000 * k + j) for j in range(batches)] for k in range(TASKS)}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Multiplications of all linear layers, added to the one number that is given."""
    work = [0]

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        work[0] += args[0].numel() * module.out_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def plain(model: nn.Module, data: Data) -> None:
    """One forward pass of all inputs."""
    with torch.no_grad():
        for listed in data.values():
            for batch in listed:
                backbone_output(model, batch)


def cost(quick: bool, count: int) -> dict[str, float]:
    """Seconds and work of a plain pass and of a fit."""
    model, data = make_model(quick).eval(), make_data(count)
    adapters = make_adapters(model, TASKS)
    found: dict[str, float] = {}
    for name, way in {
        "plain": lambda: plain(model, data),
        "fit": lambda: fit(model, adapters, data, spill=False),
    }.items():
        with counted(model) as work:
            start = time.perf_counter()
            way()
            found |= {f"{name} s": time.perf_counter() - start, f"{name} work": float(work[0])}
    return found


def run_fit(quick: bool, count: int, where: str) -> None:
    """What a process does whose memory is measured."""
    model = make_model(quick).eval()
    fit(model, make_adapters(model, TASKS), make_data(count), spill=where == "disk")


def peak(quick: bool, count: int, where: str) -> float:
    """Of a process, in MB."""
    child = [sys.executable, "-m", "benchmarks.speed.fit", "--child", str(count), where]
    return measure([*child, *(["--quick"] if quick else [])]).peak / 2**20


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; results go to the work folder")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    parser.add_argument("--child", nargs=2, metavar=("INPUTS", "WHERE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return run_fit(given.quick, int(given.child[0]), given.child[1])
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for count in INPUTS[:1] if given.quick else INPUTS:
        one = cost(given.quick, count)
        one |= {f"peak MB, {where}": peak(given.quick, count, where) for where in ("memory", "disk")}
        rows.append(
            [
                count, one["plain s"], one["fit s"], one["fit s"] / one["plain s"], one["fit work"] / one["plain work"],
                one["peak MB, memory"], one["peak MB, disk"],
            ]
        )  # fmt: skip
        raw[f"{count} inputs"] = one
    body = (
        "A Llama of 43 million random weights (6 blocks of width 768, float32),"
        f" {TASKS} adapters of rank {RANK} on the attention's four layers, inputs of {TOKENS} tokens in batches of"
        f" {ROWS}. A pass: the model's forward pass over all inputs of all tasks, once. Work: multiplications of linear"
        " layers, counted. Peak memory is of whole processes, with hidden states in memory or on disk.\n\n"
        + results.table(
            [
                "inputs a task",
                "a pass s",
                "fit s",
                "fit in passes",
                "its work in passes",
                "peak MB",
                "on disk: peak MB",
            ],
            rows,
        )
    )
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    results.write("Speed: fitting cores", body, raw, seed=0, folder=folder)
    return None


if __name__ == "__main__":
    main()
