"""Kill -9 at random moments: ``python -m benchmarks.reliability.kill``. The output is whole or absent, every time.

Merges, merges into a sharded base, fits, and batches of merges run in a child process; with ``resume`` they are run
again, and killed again, until one ends, and the result is that of a run that nobody disturbed. A batch has four
results, each whole or absent; it needs no ``resume`` to go on, and what was whole is not written again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import results
from coremerge import Adapter, LowRank
from coremerge.batch import run_batch
from coremerge.pipeline import merge_files

LAYERS, WIDTH, RANK, ADAPTERS = 24, 192, 8, 3
TRIES = 4
"""Times that a run that can be resumed is killed before it is left in peace."""

Job = Callable[[Path, bool], object]
"""Makes the result in a folder; with or without resume."""

Files = dict[str, bytes]
"""Of a result: name → content."""

PARTS = {"batch": ("all/default", "all/ties", "model/default", "model/ties")}
"""The results of a job that has several, below its folder."""


def names() -> list[str]:
    """Of the modules."""
    return [f"model.layers.{i}.self_attn.{x}_proj" for i in range(LAYERS) for x in "qv"]


def make_inputs(folder: Path) -> list[Path]:
    """Adapters of random factors."""
    draw = torch.Generator().manual_seed(0)
    paths = []
    for i in range(ADAPTERS):
        factors = {
            n: (torch.randn(WIDTH, RANK, generator=draw), torch.randn(RANK, WIDTH, generator=draw)) for n in names()
        }
        Adapter.from_updates({n: LowRank(*pair) for n, pair in factors.items()}).save(folder / f"adapter{i}")
        paths.append(folder / f"adapter{i}")
    return paths


def make_base(folder: Path) -> Path:
    """Their base model, in four shards."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    home = {f"{name}.weight": f"model-{i % 4}.safetensors" for i, name in enumerate(names())}
    for file in sorted(set(home.values())):
        held = {key: torch.randn(WIDTH, WIDTH, generator=draw) for key, place in home.items() if place == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 4 * WIDTH**2 * len(home)}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 192}')
    return folder


def make_fit(folder: Path) -> list[str]:
    """A tiny BERT, two adapters of it and inputs for both; the words that fit them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2}
    torch.manual_seed(2)
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))
    model.save_pretrained(folder / "bert")
    inner = Tokenizer(models.WordLevel({"[PAD]": 0} | {f"w{i}": i for i in range(1, 50)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[PAD]")
    words.save_pretrained(folder / "bert")
    texts = "\n".join(" ".join(f"w{(i * j) % 49 + 1}" for j in range(3, 9)) for i in range(1, 9))
    (folder / "texts.txt").write_text(texts)
    adapted = [name for name, _ in model.named_modules() if name.endswith((".query", ".value"))]
    draw = torch.Generator().manual_seed(3)
    for name in ("fit0", "fit1"):
        factors = {n: [torch.randn(64, 4, generator=draw) / 8 for _ in "BA"] for n in adapted}
        Adapter.from_updates({n: LowRank(b, a.mT) for n, (b, a) in factors.items()}).save(folder / name)
    data = [f"{name}={folder / 'texts.txt'}" for name in ("fit0", "fit1")]
    sources = [str(folder / name) for name in ("fit0", "fit1")]
    return ["fit", *sources, "--base", str(folder / "bert"), "--data", data[0], "--data", data[1], "--quiet"]


def jobs(folder: Path) -> dict[str, Job]:
    """All that is killed."""
    sources, base, fit = make_inputs(folder), make_base(folder / "base"), make_fit(folder)
    manifest = make_manifest(folder, sources, base)
    return {
        "merge": lambda out, resume: merge_files(sources, out, threads=1, resume=resume),
        "merge --into": lambda out, resume: merge_files(sources, out, into=base, threads=1, resume=resume),
        "fit": lambda out, resume: command([*fit, "-o", str(out), *(["--resume", str(kept(out))] if resume else [])]),
        "batch": lambda out, resume: merges(manifest, out),
    }


def make_manifest(folder: Path, sources: list[Path], base: Path) -> Path:
    """Two recipes on two sets, one of which goes into the base."""
    sets = {"all": [*map(str, sources)], "model": {"models": [*map(str, sources[:2])], "into": str(base)}}
    recipes = {"default": {}, "ties": {"merge_method": "ties", "parameters": {"density": 0.2}}}
    path = folder / "batch.yaml"
    path.write_text(json.dumps({"recipes": recipes, "sets": sets}))
    return path


def merges(manifest: Path, out: Path) -> None:
    """A batch.

    Raises:
        RuntimeError: a job of it failed.
    """
    failed = run_batch(manifest, out, threads=1).failed
    if failed:
        raise RuntimeError(failed[0].error)


def kept(out: Path) -> Path:
    """Where a fit keeps what is done; it is the person's own, and stays."""
    return out.with_name("kept")


def command(words: list[str]) -> None:
    """The command ``coremerge`` itself.

    Raises:
        RuntimeError: it ended with another exit status than 0.
    """
    from coremerge.cli._app import app

    status = app(words, standalone_mode=False)
    if status:
        raise RuntimeError(f"exit status {status} of coremerge {' '.join(words)}")


def weights(out: Path) -> Files | None:
    """The bytes of what was written; None where nothing was."""
    if not out.exists():
        return None
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def whole(out: Path, expected: dict[str, Files | None]) -> dict[str, dict[Path, int]]:
    """The results that are there → their files, and when those were written.

    Raises:
        AssertionError: one is not what an undisturbed run writes.
    """
    found = {part: weights(out / part) for part in expected}
    assert all(found[part] in (None, expected[part]) for part in expected), "half an output"
    there = [part for part in expected if found[part] is not None]
    return {part: {file: file.stat().st_mtime_ns for file in (out / part).rglob("*")} for part in there}


def run(job: Job, out: Path, resume: bool, after: float | None = None) -> None:
    """The job in a child process, which is killed after so many seconds unless it has ended by then.

    Raises:
        RuntimeError: it failed by itself.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            job(out, resume)
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"it failed by itself, with exit status {os.WEXITSTATUS(status)}")


def clean(out: Path) -> None:
    """Remove the result and what a killed run left beside it."""
    for path in (out, *out.parent.glob(f".{out.name}.*")):
        shutil.rmtree(path, ignore_errors=True)
    kept(out).unlink(missing_ok=True)


def campaign(
    job: Job, folder: Path, resume: bool, moments: int, *, seed: int = 0, parts: tuple[str, ...] = ("",)
) -> Counter[str]:
    """What became of runs that were killed at so many random moments.

    Raises:
        AssertionError: an output is there and is not what an undisturbed run writes, or was written twice.
    """
    out, draw = folder / "OUT", random.Random(seed)
    clean(out)
    start = time.perf_counter()
    run(job, out, False)
    lasts = time.perf_counter() - start
    expected = {part: weights(out / part) for part in parts}
    clean(out)
    found: Counter[str] = Counter()
    for _ in range(moments):
        there: dict[str, dict[Path, int]] = {}
        for _ in range(TRIES if resume else 1):
            run(job, out, resume, after=draw.uniform(0, 1.1 * lasts))
            before, there = there, whole(out, expected)
            assert before.items() <= there.items(), "written again"
            found.update({"whole": len(there), "absent": len(expected) - len(there)})
            if len(there) == len(expected):
                break
        if resume and len(there) < len(expected):
            run(job, out, resume)
            after = whole(out, expected)
            assert len(after) == len(expected), "not all of it is there"
            assert there.items() <= after.items(), "written again"
            assert kept(out).exists() or not list(folder.glob(".OUT.*")), "something is left behind"
            found["resumed to the same bytes"] += 1
        clean(out)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=100, help="of each kind")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a pool of threads would not be there after a fork
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, job in jobs(folder).items():
            for resume in (False, True):
                found = campaign(job, folder, resume, given.moments, parts=PARTS.get(label, ("",)))
                named = label + (", run again" if label in PARTS else " --resume") * resume
                rows.append([named, found["absent"], found["whole"], found["resumed to the same bytes"]])
                sys.stderr.write(f"{rows[-1]}\n")
    text = (
        f"Kill -9 at {given.moments} random moments of each, from the first to a tenth after the last; with --resume"
        f" or run again killed up to {TRIES} times, then left in peace. Whole: byte for byte what an undisturbed run"
        " writes. Of a batch, each of its four results is counted; one that was whole is not written again.\n\n"
    )
    header = ["run", "killed, output absent", "output whole", "resumed to the same bytes"]
    results.write("Reliability: killed", text + results.table(header, rows), rows, seed=0, folder=given.results)


if __name__ == "__main__":
    main()
