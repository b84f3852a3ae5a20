"""What a user would pick instead, as whole processes: PEFT's ``cat`` and ``svd`` and mergekit, beside this tool.

Both need a base model, which stand-ins replace: for PEFT the adapted layers alone, their weights zero, in memory; for
mergekit a Llama of the same widths on disk. ``python -m benchmarks.speed.others SHAPE LAYERS cat|svd OUT ADAPTER…`` is
the process that is timed for PEFT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.speed import shapes
from benchmarks.speed.process import Usage, measure, median
from benchmarks.speed.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from benchmarks.speed.run import Settings

Command = list[str | Path]

WIDE = 1024
"""Above this width, mergekit and PEFT's svd get one layer, and this tool beside them, too."""


@dataclass(frozen=True)
class Contest:
    """What is timed: a label, the set's number of layers, and the process."""

    label: str
    shape: Shape
    command: Command


def llama_like(shape: Shape) -> Shape:
    """The same widths under a Llama's names, as mergekit can load no less than a whole causal model."""
    sizes = list(shape.modules.values())
    modules = {f"self_attn.{name}_proj": size for name, size in zip("qkvo", sizes, strict=True)}
    return replace(shape, layer="model.layers.{layer}.{module}", modules=modules)


def make_llama(shape: Shape, folder: Path) -> Path:
    """A Llama with the widths and layers of ``shape`` and a vocabulary of 256, at random, under ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"llama-{shape.key}"
    if not (path / "config.json").exists():
        width, narrow = shape.modules["self_attn.q_proj"][0], shape.modules["self_attn.k_proj"][0]
        head = min(128, narrow)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=7 * width // 2, num_hidden_layers=shape.layers, vocab_size=256,
            num_attention_heads=width // head, num_key_value_heads=narrow // head, head_dim=head,
        )  # fmt: skip
        torch.manual_seed(shape.seed)
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def contests(shape: Shape, work: Path, out: Path) -> Iterator[Contest]:
    """This tool and the others on one set."""
    from benchmarks.speed.run import merge_command

    shape = llama_like(shape)
    folders = shapes.make(shape, work)
    floor = Path(__file__).with_name("floor.py")
    yield Contest("floor", shape, [sys.executable, floor, out, *shapes.files(folders)])
    yield Contest("coremerge merge", shape, merge_command(folders, out))
    yield Contest("PEFT cat", shape, _peft(shape, "cat", out, folders))
    few = replace(shape, layers=1) if shape.modules["self_attn.q_proj"][0] > WIDE else shape
    folders = shapes.make(few, work)
    yield Contest("PEFT svd", few, _peft(few, "svd", out, folders))
    base = make_llama(few, work)
    into = [*merge_command(folders, out), "--into", base]
    yield Contest("coremerge merge --into base", few, into)
    yield Contest("mergekit, task arithmetic", few, mergekit(few, base, folders, work, out))


def _peft(shape: Shape, how: str, out: Path, folders: list[Path]) -> Command:
    return [sys.executable, "-m", "benchmarks.speed.others", shape.name, str(shape.layers), how, out, *folders]


def mergekit(shape: Shape, base: Path, folders: list[Path], work: Path, out: Path) -> Command:
    """``mergekit-yaml`` on the adapters, each of which it first merges into a model of its own."""
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base.resolve()),
        "dtype": "bfloat16",
        "models": [
            {"model": f"{base.resolve()}+{folder.resolve()}", "parameters": {"weight": 1 / len(folders)}}
            for folder in folders
        ],
    }
    path = work / f"mergekit-{shape.key}.yml"
    path.write_text(json.dumps(recipe))
    tool = Path(sys.executable).with_name("mergekit-yaml")
    return [tool, path, out, "--lora-merge-cache", cache(work), "--no-copy-tokenizer"]


def cache(work: Path) -> Path:
    """Where mergekit keeps the models it makes of adapters."""
    return work / "mergekit-cache"


def compare(settings: Settings) -> tuple[str, object]:
    """One table over both sets."""
    rows: list[list[object]] = []
    raw: dict[str, object] = {}
    sets = [settings.shape] if settings.shape.name == "tiny" else [SHAPES["llama-3-8b"], SHAPES["vit-b"]]
    for shape in sets:
        listed = list(_runnable(contests(shape, settings.work, settings.work / "out")))
        taken, sizes = _by_turns(listed, settings)
        for contest, size in zip(listed, sizes, strict=True):
            usages = taken[contest.label]
            middle = median(usages)
            part = f"{contest.shape.layers} of {shape.layers} layers" if contest.shape.layers < shape.layers else "all"
            rows.append([shape.name, contest.label, part, f"{middle.wall:.2f}", f"{middle.cpu:.2f}",
                         round(middle.peak / 1e6), round(size / 1e6, 1)])  # fmt: skip
            raw[f"{shape.name}: {contest.label}"] = [asdict(usage) for usage in usages]
    header = ["shapes", "process", "layers", "wall s", "processor s", "peak MB", "out MB"]
    return (
        f"Whole processes from files to files, medians of {settings.repeats} by turns; {_versions()}. coremerge: tsv +"
        " isotropize, scale auto, rank exact; PEFT: weighted sum (svd: cut to rank r) on the adapted layers alone;"
        " mergekit: the sum into a Llama of the same widths (vocabulary 256), which it first makes one model an adapter"
        " of; `--into base` writes the same kind of model. Where a tool takes minutes a layer, one layer.\n\n"
        + results.table(header, rows),
        raw,
    )


def _versions() -> str:
    return ", ".join(results.version(name) for name in ("peft", "mergekit"))


def _runnable(listed: Iterator[Contest]) -> Iterator[Contest]:
    from importlib.util import find_spec

    for contest in listed:
        needed = {"PEFT": "peft", "merg": "mergekit"}.get(contest.label[:4])
        if needed is None or find_spec(needed):
            yield contest
        else:
            print(f"{contest.label}: not run, {needed} is not installed", flush=True)


def _by_turns(listed: list[Contest], settings: Settings) -> tuple[dict[str, list[Usage]], list[int]]:
    """What each took, and the bytes that it wrote; a first turn does not count, unless it is the only one."""
    from benchmarks.speed.run import remove

    out = settings.work / "out"
    taken: dict[str, list[Usage]] = {contest.label: [] for contest in listed}
    sizes: dict[str, int] = {}
    for turn in range(0 if settings.repeats > 1 else 1, settings.repeats + 1):
        for contest in listed:
            remove(out)
            remove(cache(settings.work))
            usage = measure(contest.command)
            sizes[contest.label] = _size(out)
            if turn:
                taken[contest.label].append(usage)
            print(f"{turn}: {contest.label}: {usage.wall:.2f} s", flush=True)
    remove(out)
    remove(cache(settings.work))
    return taken, [sizes[contest.label] for contest in listed]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def peft_merge(shape: Shape, how: str, out: Path, folders: list[Path]) -> None:
    """PEFT's ``add_weighted_adapter`` from files to a file."""
    from peft import PeftModel

    from benchmarks.speed.stand_in import base_model

    model = PeftModel.from_pretrained(base_model(shape), folders[0], adapter_name="t0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"t{i}")
    names = [f"t{i}" for i in range(len(folders))]
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=how, svd_rank=shape.rank)
    model.save_pretrained(out, selected_adapters=["merged"])


def main() -> None:
    name, layers, how, out, *folders = sys.argv[1:]
    shape = llama_like(replace(SHAPES[name], layers=int(layers)))
    peft_merge(shape, how, Path(out), [Path(folder) for folder in folders])


if __name__ == "__main__":
    main()
