"""Numbers at the edge of what floats hold: ``python -m benchmarks.reliability.numbers``.

Adapters with extreme scales, denormal or huge factors, NaN, zero modules, repeated singular values, huge neighbours
and odd weights are written as files, merged, and read back. Each result is that of an oracle of its own to the
tolerance, or warned of by name, or refused in one message; all else is a finding: the run then ends with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import results
from benchmarks.reliability.oracle import Scaled, Wanted, wanted
from benchmarks.reliability.problems import DTYPES, FAULTS, MODULES, Fault, Problem, ordinary
from coremerge import Adapter, CoremergeError, LowRank, Recipe
from coremerge.merging import merge
from coremerge.pipeline import merge_files

TOLERANCE = 1e-9
"""In Frobenius norm, of the whole module; results that are written in 16 or 32 bits: twice their epsilon."""

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_inputs(problem: Problem, folder: Path) -> list[Path]:
    """The files, as PEFT would write them; scales become what the config's alpha says."""
    paths = []
    for i in range(problem.count):
        path, tensors = folder / f"adapter{i}", {}
        path.mkdir()
        for name, tasks in problem.tasks.items():
            for letter, factor in (("A", tasks[i].right), ("B", tasks[i].left)):
                tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = factor.to(DTYPES[problem.dtype]).contiguous()
        save_file(tensors, path / WEIGHTS)
        first = problem.tasks["layers.0.q_proj"][i]
        rank = first.left.shape[1]
        alpha = first.scale * rank
        problem.change(lambda task, scale=alpha / rank: task.scaled(scale), i)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def recipe_of(problem: Problem) -> Recipe:
    """What ``coremerge`` is asked for."""
    how = problem.how
    steps: list[Any] = {"none": [], "truncate": [{"truncate": {"rank": 2}}]}.get(how.step, [how.step])
    weights = [task.weight for task in problem.tasks["layers.0.q_proj"]]
    return Recipe(
        space=how.space, method=how.method, parameters=dict(how.options), steps=steps, scale=how.scale,
        weights=weights, dtype=problem.written,
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        kind: right, warned of, refused or finding.
        error: of a right one, relative to the oracle's norm.
        said: the message, or what is wrong.
    """

    kind: str
    error: float = 0.0
    said: str = ""


def tried(problem: Problem, folder: Path) -> Outcome:
    """Writes, merges, reads back, compares."""
    paths = write_inputs(problem, folder)
    try:
        merged = merge_files(paths, folder / "out", recipe_of(problem), threads=1)
    except CoremergeError as error:
        return _refused(problem, error)
    except Exception:
        return Outcome("finding", said=traceback.format_exc()[-1500:])
    if problem.must_say:
        return Outcome("finding", said="not refused")
    written, goals = load_file(folder / "out" / WEIGHTS), wanted(problem.tasks, problem.how, [p.name for p in paths])
    errors = {name: error_of(written, name, goals[name]) for name in MODULES}
    if all(error <= tolerance(problem) for error in errors.values()):
        return Outcome("right", max(errors.values()))
    wrong = [name for name, error in errors.items() if not error <= tolerance(problem)]
    notes = [note for note in merged.notes if wrong[0] in note or " more modules" in note]
    return Outcome("warned of", said=notes[0]) if notes else Outcome("finding", said=f"off by {errors}")


def written_in(problem: Problem) -> str:
    """The dtype of the result."""
    return problem.written or problem.dtype


def tolerance(problem: Problem) -> float:
    """See :data:`TOLERANCE`."""
    return max(TOLERANCE, 2 * torch.finfo(DTYPES[written_in(problem)]).eps)


def _refused(problem: Problem, error: CoremergeError) -> Outcome:
    missing = [part for part in problem.must_say if part not in str(error)]
    if not problem.may_refuse or missing:
        return Outcome("finding", said=f"refused, without {missing}: {error}")
    return Outcome("refused", said=f"{type(error).__name__}: {error.what}")


def error_of(written: dict[str, Tensor], name: str, goal: Wanted) -> float:
    """In Frobenius norm, relative to what is wanted, or to a thousandth of the inputs where these cancel out."""
    left, right = (Scaled.of(written[f"{PREFIX}{name}.lora_{x}.weight"]) for x in "BA")
    found = Scaled.of(left.value @ right.value).moved(left.exponent + right.exponent)
    want = Scaled.of(goal.merged.value).moved(goal.merged.exponent)
    inputs = Scaled.of(goal.inputs.value / 1000).moved(goal.inputs.exponent)
    top = max((x.exponent for x in (found, want, inputs) if bool((x.value != 0).any())), default=0)
    size = max(float(want.at(top).norm()), float(inputs.at(top).norm()))
    return float((found.at(top) - want.at(top)).norm()) / size if size else float(bool((found.value != 0).any()))


@dataclass
class Tally:
    """Of one fault.

    Attributes:
        found: how many cases of each kind of outcome.
        exact: largest error of those written in float64.
        rounded: largest error of the others, in epsilons of their dtype.
        said: messages without what differs from case to case.
        findings: in full.
    """

    found: Counter[str] = field(default_factory=Counter)
    exact: float = 0.0
    rounded: float = 0.0
    said: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, problem: Problem, outcome: Outcome, label: str) -> None:
        """One more case."""
        self.found[outcome.kind] += 1
        if outcome.kind == "finding":
            self.findings.append(f"{label}, {problem.how}, {problem.dtype}, {problem.written}: {outcome.said}")
        elif outcome.said:
            self.said[alike(outcome.said)] += 1
        if written_in(problem) == "float64":
            self.exact = max(self.exact, outcome.error)
        else:
            self.rounded = max(self.rounded, outcome.error / torch.finfo(DTYPES[written_in(problem)]).eps)


def alike(message: str) -> str:
    """A message without names and sizes."""
    message = re.sub(r"layers\.\d\.q_proj( and \d+ more modules)?", "MODULE", message)
    return re.sub(r"(?<![a-z\d])\d[\d.]*(e[+-]?\d+)?\b", "N", message)


def campaign(label: str, fault: Fault, draws: range) -> Tally:
    """What became of one case for each of ``draws``."""
    tally = Tally()
    for seed in draws:
        problem = ordinary(random.Random(f"{seed} {label}"))
        fault(problem)
        with tempfile.TemporaryDirectory() as name:
            tally.add(problem, tried(problem, Path(name)), f"{label} {seed}")
    return tally


def short_lifts(draws: range) -> list[object]:
    """A row: merges, how many are lifted in float32, and how far these are from float64 at most."""
    errors = [error for error in map(_short_lift, draws) if error is not None]
    return [len(draws), len(errors), max(errors, default=0.0)]


def _short_lift(seed: int) -> float | None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    m, n, rank, decay = draw.choice([24, 96]), draw.choice([20, 64]), draw.choice([2, 4, 8]), draw.choice([1, 0.5, 0.1])
    common = draw.choice([0, 0, 0.9, 0.99]) * torch.randn(m, rank, generator=generator)
    kind = draw.choice([torch.float16, torch.bfloat16])

    def one() -> Adapter:
        left = (common + torch.randn(m, rank, generator=generator) / 4) * decay ** torch.arange(rank)
        return Adapter.from_updates(
            {"layer": LowRank(left.to(kind), torch.randn(rank, n, generator=generator).to(kind))}
        )

    method, step = draw.choice(["sum", "tsv", "ties", "cart"]), draw.choice([[], ["isotropize"]])
    recipe = Recipe(
        space=draw.choice(["core", "knots"]), method=method, steps=step, dtype=draw.choice(["half", "bf16"])
    )
    merged = merge([one() for _ in range(draw.choice([2, 3, 6]))], recipe, threads=1).adapter
    short, exact = merged.read("layer", torch.float32), merged["layer"]
    if all(torch.equal(getattr(short, side), getattr(exact, side).float()) for side in ("left", "right")):
        return None
    return max(_apart(short.left, exact.left), _apart(short.right, exact.right))


def _apart(short: Tensor, exact: Tensor) -> float:
    return float((short.double() - exact).abs().max() / exact.abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="cases of each fault")
    parser.add_argument("--short", type=int, default=1500, help="merges that may be lifted in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, help="one fault")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of RESULTS.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    said, findings = Counter[str](), list[str]()
    for label in [given.only] if given.only else FAULTS:
        tally = campaign(label, FAULTS[label], range(given.seed, given.seed + given.count))
        counts = [tally.found[kind] for kind in ("warned of", "refused", "finding")]
        rows.append([label, given.count, tally.found["right"], tally.exact, tally.rounded, *counts])
        said += tally.said
        findings += tally.findings
        sys.stderr.write("\n".join([f"{rows[-1]}", *tally.findings[:3], ""]))
    short = short_lifts(range(given.seed, given.seed + given.short))
    text = _text(rows, said, short)
    numbers = {"faults": rows, "short": short, "messages": dict(said)}
    results.write("Reliability: numbers", text, numbers, seed=given.seed, folder=given.results)
    if findings or float(str(short[2])) > 1e-5:
        sys.exit(f"{len(findings)} findings; float32 is {short[2]} off")


def _text(rows: list[list[object]], said: Counter[str], short: list[object]) -> str:
    header = ["fault", "cases", "right", "error, float64", "error, rounded", "warned of", "refused", "findings"]
    return (
        "Files of odd numbers, merged into files and read back: random spaces, methods, steps, scales and dtypes of"
        f" both sides. Right: within {TOLERANCE:g} of the oracle in Frobenius norm (float64), or two epsilons of the"
        " dtype that is written; the largest errors, the latter in epsilons. Warned of or refused: in words that name"
        f" the module or the file. All else is a finding.\n\n{results.table(header, rows)}\n\n"
        f"{results.table(['message', 'cases'], [list(item) for item in said.most_common()])}\n\n"
        "The lift in float32, against float64, before it is rounded to 16 bits:\n\n"
        + results.table(["merges", "lifted in float32", "largest difference"], [short])
    )


if __name__ == "__main__":
    main()
