"""What learning merge weights costs: ``python -m benchmarks.speed.learning``.

One task's share of a step beside the same forward and backward pass of PEFT with all adapters active and trained; and
the peak memory of whole runs with more and more tasks. On a Llama of random weights. ``--quick``: a tiny one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks import results
from benchmarks.speed.process import measure
from coremerge import Adapter, LowRank
from coremerge.learning import Settings, learn_weights
from coremerge.learning.backbone import frozen
from coremerge.learning.blocks import ALL, measured_of
from coremerge.learning.forward import MergedModel
from coremerge.learning.objectives import Entropy, Match, NullSpace, Objective

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ROWS, TOKENS = 16, 4, 128
TASKS, MEMORY_TASKS = (2, 4, 8), (1, 2, 8, 32)


def make_model(quick: bool) -> nn.Module:
    """Random weights; 43 million of them, or few."""
    torch.manual_seed(0)
    width, layers = (64, 2) if quick else (768, 6)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        use_cache=False,
    )
    return LlamaModel(config)


def make_adapters(model: nn.Module, count: int) -> dict[str, Adapter]:
    """Of random factors, for the attention's four layers."""
    draw = torch.Generator().manual_seed(1)
    shapes = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(TARGETS)
    }

    def factor(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=draw)

    return {
        f"task{k}": Adapter.from_updates({n: LowRank(factor(m, RANK), factor(RANK, w)) for n, (m, w) in shapes.items()})
        for k in range(count)
    }


def make_batch(seed: int) -> dict[str, Tensor]:
    """Random tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, (ROWS, TOKENS), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def peft_step(quick: bool, count: int) -> Iterator[Callable[[], None]]:
    """Forward and backward pass of a PEFT model, all adapters active, all of their factors trained."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on several active adapters
        model = get_peft_model(make_model(quick), config)  # type: ignore[arg-type]
        for k in range(1, count):
            model.add_adapter(f"task{k}", config)
        model.base_model.set_adapter(["default", *(f"task{k}" for k in range(1, count))])  # type: ignore[operator]
    batch = make_batch(0)

    def step() -> None:
        model(**batch).last_hidden_state.square().mean().backward()
        model.zero_grad()

    yield step


@contextmanager
def our_step(quick: bool, count: int, objective: str) -> Iterator[Callable[[], None]]:
    """One task's forward and backward passes."""
    model, batch = make_model(quick), make_batch(0)
    adapters = make_adapters(model, count)
    with frozen(model):
        merged = MergedModel(model, adapters)
        values = {name: nn.Parameter(torch.full((count,), 0.3)) for name in merged.targets}
        head = torch.randn(model.get_input_embeddings().embedding_dim, 10)  # type: ignore[operator]
        measured = measured_of(merged, ALL)
        kinds: Mapping[str, Objective] = {
            "nsc": NullSpace(merged, measured),
            "nsc-own": NullSpace(merged, measured, own=True),
            "match": Match(merged, list(merged.targets)),
            "entropy": Entropy(merged, {"task0": lambda output, _: output.last_hidden_state.mean(1) @ head}),
        }

        def step() -> None:
            with kinds[objective]("task0", batch, lambda target: values[target.name][target.owner]) as loss:
                loss.backward()  # type: ignore[no-untyped-call]

        yield step


def timed(quick: bool, count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, by turns; the first turn does not count."""
    ways = {"PEFT": peft_step(quick, count)}
    ways |= {name: our_step(quick, count, name) for name in ("nsc", "nsc-own", "match", "entropy")}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    steps = {name: way.__enter__() for name, way in ways.items()}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def learn(quick: bool, count: int, objective: str) -> None:
    """What a process does whose memory is measured."""
    model = make_model(quick)
    adapters = make_adapters(model, count)
    data = {name: [make_batch(k)] for k, name in enumerate(adapters)}
    learn_weights(model, adapters, data, preset=Settings(objective, steps=2))


def memory(quick: bool, objective: str) -> list[list[object]]:
    """A row for each number of tasks: the peak, and what the adapters hold."""
    rows: list[list[object]] = []
    width = sum(sum(update.shape) for update in make_adapters(make_model(quick), 1)["task0"].values())
    for count in MEMORY_TASKS[:1] if quick else MEMORY_TASKS:
        child = [sys.executable, "-m", "benchmarks.speed.learning", "--child", str(count), objective]
        used = measure([*child, *(["--quick"] if quick else [])])
        rows.append([count, used.peak / 2**20, count * RANK * width * 4 / 2**20])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; results go to the work folder")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md")
    parser.add_argument("--child", nargs=2, metavar=("TASKS", "OBJECTIVE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return learn(given.quick, int(given.child[0]), given.child[1])
    table: list[list[object]] = []
    raw: dict[str, object] = {}
    for count in TASKS[:1] if given.quick else TASKS:
        taken = timed(given.quick, count, 1 if given.quick else given.repeats)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        table.append([count, medians["PEFT"], *(value / medians["PEFT"] for value in list(medians.values())[1:])])
        raw[f"T = {count}"] = taken
        print(*table[-1], flush=True)
    peaks = {objective: memory(given.quick, objective) for objective in ("nsc-own", "match")}
    raw["memory"] = peaks
    header = ["adapters", "PEFT s", "nsc × PEFT", "nsc-own × PEFT", "match × PEFT", "entropy × PEFT"]
    body = (
        "A Llama of 43 million random weights (6 blocks of width 768, float32), adapters of rank 16 on the attention's"
        f" four layers, batches of {ROWS} × {TOKENS} tokens. One task's forward and backward pass, medians by turns,"
        " beside those of PEFT with all adapters active and their factors trained; `nsc-own` measures its goals once a"
        " batch, in the turn that does not count.\n\n"
        + results.table(header, table)
        + "\n\nPeak memory of whole processes, two steps, one batch a task. An adapter's factors are held as they"
        " were read and side by side at the module, the right ones also as an orthonormal basis; the rest of the growth"
        " is activations of the adapters' joint rank.\n\n"
        + results.table(
            ["tasks", "adapters' factors MB", "nsc-own: peak MB", "match: peak MB"],
            [[a, size, peak, b[1]] for (a, peak, size), b in zip(peaks["nsc-own"], peaks["match"], strict=True)],
        )
    )
    folder = given.results or (Path("work/bench") if given.quick else results.ROOT)
    results.write("Speed: learning merge weights", body, raw, seed=0, folder=folder)
    return None


if __name__ == "__main__":
    main()
