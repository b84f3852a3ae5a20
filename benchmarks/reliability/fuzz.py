"""Broken files, by the hundred thousand: ``python -m benchmarks.reliability.fuzz``.

Files that are whole are changed at random, as bytes or as JSON. Reading them gives a result or one of our own errors;
all else is a finding, which is kept and ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from benchmarks import results
from coremerge import Adapter, CoremergeError, LowRank, load
from coremerge.batch import jobs_of
from coremerge.evaluation import read_taskset
from coremerge.formats.base_weights import open_base
from coremerge.formats.journal import RECORD, Journal
from coremerge.held import Held
from coremerge.learning.result import Weights, read_weights
from coremerge.pipeline import merge_files, prepare
from coremerge.recipe import read_recipe
from coremerge.report.record import FILE, read_record

MEMORY = 16 * 2**30
"""Bytes of address space: what asks for more than a file can hold is a finding."""

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e308, 5e-324, float("nan"),
    float("inf"), "", "x", "\0", "../../x", "/etc/passwd", "a" * 2000, "(a+)+$", "[",
    "\u202e", "\ud83d", "\x1b[2J", "nan", "1e999",
    [], {}, [[]], [None], {"": ""}, ["q_proj"] * 50, {"a": {"a": {"a": {}}}},
]  # fmt: skip
"""What takes the place of a part of a JSON file."""

FACTS = {
    "module": "a", "amplification": 1.0, "of": [True, True],
    "report": {"shape": [4, 4], "ranks": {"A": 2}, "merged_rank": 2, "rank": 2, "energy": 1.0, "lost": 0.0,
               "input_norm": 1.0, "input_frobenius": 1.0, "norm": 1.0, "zero": [], "alone": False},
}  # fmt: skip
"""Of a merged module that an earlier run kept."""

PIECES = [
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"-",
    b"0",
    b"9" * 30,
    b"[" * 5000,
    b'{"a":' * 5000,
    b"\n",
    b"&a [*a]",
    b"!!python/x",
    b"<<:",
    b"!!bool x",
    b"!!int x",
    b"2001-99-99",
    b"1:" * 500,
    b"\\ud83d",
]
"""What is put between a file's bytes."""

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        file: its name within the folder.
        whole: bytes that are right.
        read: what is done with the folder.
        is_json: whether it is changed as JSON, too.
    """

    file: str
    whole: bytes
    read: Read
    is_json: bool = True


def make_journal(folder: Path) -> Path:
    """A folder with a journal of three parts."""
    folder.mkdir()
    with Journal(folder / "journal", "mark") as made:
        for i in range(3):
            made.add({"part": i}, {"x": torch.ones(i + 1)})
    return folder


def targets(folder: Path) -> dict[str, Target]:
    """All kinds; their folders hold what else is needed."""
    draw = torch.Generator().manual_seed(0)

    def factors() -> LowRank:
        return LowRank(torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw))

    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]
    adapter = folder / "adapter"
    Adapter.from_updates({name: factors() for name in names}).save(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}
    tensors = {f"{name}.weight": torch.randn(6, 5, generator=draw) for name in names}
    base = folder / "base"
    base.mkdir()
    (base / "a.safetensors").write_bytes(save(tensors))
    (base / "config.json").write_text("{}")
    index = {"metadata": {"total_size": 480}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    recipe = {
        "models": [{"model": "A", "parameters": {"weight": 0.5}}, {"model": "B"}], "merge_method": "dare_ties",
        "parameters": {"density": 0.2, "drop_rate": 0.5}, "steps": ["isotropize"], "scale": "auto", "rank": 4,
        "dtype": "bfloat16", "space": "knots:scaled=false", "base_model": "base",
    }  # fmt: skip
    sets = {"one": ["adapter"], "two": {"models": ["adapter"], "initial": {"adapter": "x"}, "into": "base"}}
    inline = {key: value for key, value in recipe.items() if key != "models"}
    manifest = {"sets": sets, "recipes": {"x": inline, "y": {}}, "jobs": [{"set": "one", "recipe": "x", "name": "z"}]}
    task = {
        "kind": "classification",
        "metric": "accuracy",
        "classes": ["a", "b"],
        "adapter": "adapter",
        "test": "t.jsonl",
        "head": "h.safetensors",
    }
    tasks = {"name": "x", "base": "org/base", "pooling": "mean", "tasks": {"one": task}, "joint": {"all": ["one"]}}
    rows = folder / "tasks"
    rows.mkdir()
    (rows / "t.jsonl").write_text('{"text": "x", "label": "a"}\n')
    journal = make_journal(folder / "journal")
    merge_files([adapter], folder / "merged", threads=1)
    weights = folder / "w.safetensors"
    table = {"A": {"one": 0.5, "two": (0.1, 0.2)}, "B": {"one": 1.0}}
    Weights(table, {"steps": 1}, ("A", "B"), torch.zeros(1, 2), torch.zeros(2, 4)).save(weights)

    def read_all(path: Path) -> None:
        held = load(path)
        for name in held:
            held.read(name)
        prepare([path])

    def read_tasks(path: Path) -> None:
        tasks = read_taskset(path)
        for name in tasks.tasks:
            tasks.rows(name, "test")

    def read_journal(path: Path) -> None:
        Journal(path / "journal", "mark").close()

    def read_kept(path: Path) -> None:
        facts = (path / "facts.json").read_bytes()
        body = facts + save({"left": torch.ones(3, 2), "right": torch.ones(2, 3)})
        (path / "journal").unlink(missing_ok=True)
        Journal(path / "journal", "mark").close()
        with (path / "journal").open("ab") as file:
            file.write(RECORD.pack(len(body), len(facts), zlib.crc32(body)) + body)
        with Journal(path / "journal", "mark") as kept:
            held = Held(kept)
            for part in kept.parts:
                held.take(part)
            for name in held:
                held[name].combination.scaled(2.0)

    return {
        "adapter_config.json": Target("adapter_config.json", json.dumps(config).encode(), read_all),
        "adapter_model.safetensors": Target(
            "adapter_model.safetensors", (adapter / "adapter_model.safetensors").read_bytes(), read_all, is_json=False
        ),
        "a base model's index": Target("model.safetensors.index.json", json.dumps(index).encode(), open_base),
        "a recipe": Target("recipe.yaml", json.dumps(recipe).encode(), lambda path: read_recipe(path / "recipe.yaml")),
        "a manifest": Target(
            "m.yaml", json.dumps(manifest).encode(), lambda path: jobs_of(path / "m.yaml", path / "o")
        ),
        "a task set": Target("tasks.yaml", json.dumps(tasks).encode(), read_tasks),
        "merge weights": Target(
            "w.safetensors", weights.read_bytes(), lambda path: read_weights(path / "w.safetensors"), is_json=False
        ),
        "a journal": Target("journal", (journal / "journal").read_bytes(), read_journal, is_json=False),
        "a result's record": Target(FILE, (folder / "merged" / FILE).read_bytes(), read_record),
        "a merged module": Target("facts.json", json.dumps(FACTS).encode(), read_kept),
    }


def changed(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a few changes."""
    made = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, span = draw.randrange(len(made) + 1), draw.choice([1, 1, 2, 8, 64])
        match draw.randrange(6):
            case 0 if made:
                made[min(at, len(made) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del made[at : at + span]
            case 2:
                made[at:at] = made[at : at + span]
            case 3:
                made[at:at] = draw.choice(PIECES)
            case 4:
                made[at : at + span] = bytes(draw.randrange(256) for _ in range(span))
            case _:
                del made[at:]
    return bytes(made)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def rewritten(data: bytes, draw: random.Random) -> bytes:
    """JSON with a few parts gone, replaced or renamed."""
    value = {"": json.loads(data)}
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        *way, last = draw.choice([path for path in places(value) if len(path) > 1] or [("",)])
        holder: Any = value
        for key in way:
            holder = holder[key]
        match draw.randrange(4):
            case 0 if len(way):
                holder.pop(last)
            case 1 if isinstance(holder, dict) and len(way):
                holder[draw.choice([x for x in VALUES if isinstance(x, str)])] = holder.pop(last)
            case _:
                holder[last] = copy.deepcopy(draw.choice(VALUES))
        if not isinstance(value[""], dict | list):
            break
    return json.dumps(value[""]).encode()


def try_one(target: Target, data: bytes, folder: Path) -> str:
    """``result``, or the name of our error; raises what is a finding."""
    (folder / target.file).write_bytes(data)
    try:
        target.read(folder)
    except CoremergeError as error:
        return type(error).__name__
    return "result"


Keep = Callable[[str, bytes, str], None]
"""What is done with a finding: its name, the file, the trace."""


def campaign(name: str, target: Target, folder: Path, draws: range, keep: Keep) -> Counter[str]:
    """What became of changed files, one for each of ``draws``."""
    found = Counter[str]()
    assert try_one(target, target.whole, folder) == "result", f"{name}: the unchanged file is refused"
    for seed in draws:
        draw = random.Random(f"{seed} {name}")
        data = rewritten(target.whole, draw) if target.is_json and draw.random() < 0.7 else changed(target.whole, draw)
        try:
            found[try_one(target, data, folder)] += 1
        except Exception as error:
            found["finding"] += 1
            keep(f"{name}: {type(error).__name__}", data, traceback.format_exc())
    return found


def homes(folder: Path, made: Mapping[str, Target]) -> dict[str, Path]:
    """Where each kind of file is changed."""
    places = {"adapter_config.json": "adapter", "adapter_model.safetensors": "adapter", "a base model's index": "base"}
    homes = {}
    for name in made:
        homes[name] = folder / f"home of {name}".replace(" ", "-").replace("'", "")
        source = folder / places.get(name, "tasks" if name == "a task set" else "journal")
        shutil.copytree(source, homes[name])
        if name == "a task set":
            shutil.copytree(folder / "adapter", homes[name] / "adapter")
    return homes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="changed files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind")
    parser.add_argument("--findings", type=Path, default=Path("work/fuzz"), help="where findings are kept")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    said: dict[str, int] = {}

    def keep(name: str, data: bytes, trace: str) -> None:
        said[name] = said.get(name, 0) + 1
        if said[name] <= 3:
            given.findings.mkdir(parents=True, exist_ok=True)
            place = given.findings / f"{name} {said[name]}".replace("/", "_")
            place.write_bytes(data)
            sys.stderr.write(f"{place}\n{trace[-1500:]}\n")

    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        made = targets(Path(name))
        for kind, home in homes(Path(name), made).items():
            if given.only in (None, kind):
                start = time.perf_counter()
                draws = range(given.seed, given.seed + given.count)
                found = campaign(kind, made[kind], home, draws, keep)
                refused = sum(found.values()) - found["result"] - found["finding"]
                rows.append(
                    [kind, given.count, found["result"], refused, found["finding"], time.perf_counter() - start]
                )
                sys.stderr.write(f"{rows[-1]} {dict(found)}\n")
    text = (
        f"Files changed at random, as bytes or as JSON, and read: with a result, refused by one of our own errors, or"
        f" neither, which is a finding. {MEMORY >> 30} GB of address space.\n\n"
    )
    header = ["file", "changed", "read", "refused", "findings", "seconds"]
    results.write(
        "Reliability: broken files", text + results.table(header, rows), rows, seed=given.seed, folder=given.results
    )
    if said:
        sys.exit(f"findings are in {given.findings}: {said}")


if __name__ == "__main__":
    main()
