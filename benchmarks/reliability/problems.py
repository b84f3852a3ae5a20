"""Merges of odd numbers: what is in the files, and what is asked of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.reliability.oracle import ELEMENTWISE, How, Task

MODULES = {"layers.0.q_proj": (9, 6), "layers.1.q_proj": (5, 8)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SPACES = ("core", "knots", "full")
METHODS: list[tuple[str, dict[str, float]]] = [
    ("sum", {}), ("mean", {}), ("ties", {"density": 0.4}), ("dare", {"drop_rate": 0.3}), ("tsv", {}),
    ("tsv", {"rank": 2}), ("cart", {"rank": 2}),
]  # fmt: skip
STEPS = ("none", "isotropize", "balance", "truncate")
WRITTEN = ("float64", "float64", "float32", "bfloat16", "float16", None)


@dataclass
class Problem:
    """Adapters, and what is done with them.

    Attributes:
        draw: where random choices come from.
        dtype: of the files.
        tasks: module → one task per adapter.
        how: the recipe.
        written: dtype of the result; None: the files' own.
        must_say: what its refusal must say; empty: it need not be refused.
        may_refuse: whether it may be.
    """

    draw: random.Random
    dtype: str
    tasks: dict[str, list[Task]]
    how: How
    written: str | None
    must_say: tuple[str, ...] = ()
    may_refuse: bool = False

    @property
    def count(self) -> int:
        """The number of adapters."""
        return len(next(iter(self.tasks.values())))

    def change(self, change: Callable[[Task], Task], *adapters: int) -> None:
        """Every module of the ``adapters``, or of all."""
        for tasks in self.tasks.values():
            for i in adapters or range(len(tasks)):
                tasks[i] = change(tasks[i])

    def normal(self, *shape: int) -> Tensor:
        """Random numbers as the files hold them."""
        generator = torch.Generator().manual_seed(self.draw.getrandbits(60))
        return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])


def ordinary(draw: random.Random) -> Problem:
    """Nothing is odd yet."""
    method, options = draw.choice(METHODS)
    how = How(draw.choice(SPACES), method, options, draw.choice(STEPS), draw.choice([1.0, "auto"]))
    problem = Problem(draw, draw.choice(["float16", "bfloat16", "float32"]), {}, how, draw.choice(WRITTEN))
    adapters = [(draw.choice([1, 2, 3]), draw.choice([1, 2, 5, 16])) for _ in range(draw.choice([2, 3]))]
    for name, (m, n) in MODULES.items():
        problem.tasks[name] = [Task(problem.normal(m, r), problem.normal(r, n), alpha / r) for r, alpha in adapters]
    return problem


Fault = Callable[[Problem], None]
"""Makes something of an ordinary problem odd."""


def scales(*values: float) -> Fault:
    """One extreme alpha for all."""

    def fault(problem: Problem) -> None:
        factor = problem.draw.choice(values)
        problem.change(lambda task: task.times(factor))
        problem.may_refuse = True

    return fault


def half_extremes(problem: Problem) -> None:
    """Down to 2^-24, the smallest float16."""
    problem.dtype = "float16"
    _sized(problem, [65504.0, 2.0**-20, 6e-6], [65504.0, 1.0, 2.0**-20])


def wide_extremes(problem: Problem) -> None:
    problem.dtype = problem.draw.choice(["bfloat16", "float32"])
    _sized(problem, [3e38, 1e30, 1e-30, 1e-37, 1e-39], [3e38, 1.0, 1e-38])


def _sized(problem: Problem, lefts: list[float], rights: list[float]) -> None:
    """Factors whose largest entries are one of these."""
    left, right = problem.draw.choice(lefts), problem.draw.choice(rights)

    def to(x: Tensor, size: float) -> Tensor:
        return (x.double() / x.double().abs().max() * size).to(DTYPES[problem.dtype])

    problem.change(lambda task: replace(task, left=to(task.left, left), right=to(task.right, right)))
    problem.may_refuse = True


def misfit(problem: Problem) -> None:
    """A result beyond what 16 or 32 bits hold."""
    problem.written = problem.draw.choice(["float16", "bfloat16", "float32"])
    scales(*(10.0**e for e in (12, 30, 80, 120, -10, -14, -30, -80, -90, -120)))(problem)


def huge_neighbour(problem: Problem) -> None:
    """One adapter far above the others.

    Element-wise methods keep a share of a core's entries; how large it is depends on what counts as zero, but for the
    full space.
    """
    factor = 10.0 ** problem.draw.choice([4, 11, 12, 16])
    problem.change(lambda task: task.times(factor), 0)
    problem.may_refuse = True
    if problem.how.method in ELEMENTWISE and factor > 1e4:
        problem.how = replace(problem.how, space="full")


def skewed(problem: Problem) -> None:
    """The size of an update is in one factor, for one adapter in the other.

    Element-wise methods in core space see how updates are split into factors, unless they are balanced.
    """
    problem.dtype, factor = "float32", 10.0 ** problem.draw.choice([-16, -10, 10, 16])
    problem.change(lambda task: replace(task.times(1 / factor), right=task.right.float() * factor), 1)
    if problem.how.method in ELEMENTWISE and problem.how.space == "core":
        problem.how = replace(problem.how, step="balance")


def spoilt(value: float) -> Fault:
    """NaN or infinity in one module: to be refused, with the file and the tensor."""

    def fault(problem: Problem) -> None:
        module, side = problem.draw.choice(list(MODULES)), problem.draw.choice("BA")
        task = problem.tasks[module][1]
        tensor = task.left if side == "B" else task.right
        tensor.view(-1)[problem.draw.randrange(tensor.numel())] = value
        problem.must_say = "adapter1", f"{module}.lora_{side}.weight"
        problem.may_refuse = True

    return fault


def zero(*adapters: int) -> Fault:
    """All-zero modules: of these adapters, or of all."""

    def nothing(task: Task, which: str) -> Task:
        if which == "alpha":
            return task.times(0.0)
        return replace(task, **{which: torch.zeros_like(getattr(task, which))})

    def fault(problem: Problem) -> None:
        which, first = problem.draw.choice(["left", "right", "alpha"]), problem.draw.random() < 0.5
        kept = problem.tasks["layers.1.q_proj"][:]
        problem.change(lambda task: nothing(task, which), *adapters)
        if first and which != "alpha":
            problem.tasks["layers.1.q_proj"] = kept
        elif not adapters:
            problem.may_refuse, problem.must_say = True, ("nothing to merge",)

    return fault


def equal_values(problem: Problem) -> None:
    """Every singular value of an update is the same; all updates share vectors."""
    problem.dtype = "float32"
    problem.change(lambda task: Task(torch.eye(*task.left.shape), torch.eye(*task.right.shape).roll(1, 1), task.scale))
    _unambiguous(problem)


def duplicates(problem: Problem) -> None:
    for tasks in problem.tasks.values():
        tasks[:] = [tasks[0]] * len(tasks)
    _unambiguous(problem)


def flattened(problem: Problem) -> None:
    """Isotropized adapters, merged again."""
    problem.dtype = "float32"

    def flat(task: Task) -> Task:
        rank = task.left.shape[1]
        u, _, vh = torch.linalg.svd(task.left.double() @ task.right.double(), full_matrices=False)
        return replace(task, left=u[:, :rank].float(), right=vh[:rank].float())

    problem.change(flat)
    _unambiguous(problem)


def _unambiguous(problem: Problem) -> None:
    """No choice between equal directions: nothing is trimmed, dropped or cut in their midst."""
    method = problem.how.method
    options = {"ties": {"density": 1.0}, "dare": {"drop_rate": 0.0}, "cart": {"rank": 9}}.get(method, {})
    step = problem.how.step if problem.how.step != "truncate" else "none"
    space = "full" if method == "ties" else problem.how.space
    problem.how = replace(problem.how, space=space, options=options, step=step)


def weights(*values: float) -> Fault:
    """Of the adapters, in any order."""

    def fault(problem: Problem) -> None:
        for i in range(problem.count):
            weight = problem.draw.choice(values)
            problem.change(lambda task, weight=weight: replace(task, weight=weight), i)
        problem.may_refuse = True

    return fault


def overall(*values: float) -> Fault:
    """The recipe's scale."""

    def fault(problem: Problem) -> None:
        problem.how = replace(problem.how, scale=problem.draw.choice(values))
        problem.may_refuse = True

    return fault


def tall_ranks(problem: Problem) -> None:
    """Above the dimensions."""
    for i in range(problem.count):
        rank = problem.draw.choice([7, 11])
        for name, (m, n) in MODULES.items():
            task = problem.tasks[name][i]
            problem.tasks[name][i] = Task(problem.normal(m, rank), problem.normal(rank, n), task.scale)


def deficient(problem: Problem) -> None:
    """A repeated or a zero column, exactly: small whole numbers. Entries coincide, too, so that TIES may trim none."""

    def thinner(task: Task) -> Task:
        left = (2 * task.left).round()
        left[:, -1] = left[:, 0] if task.left.shape[1] > 1 else 0
        return replace(task, left=left)

    problem.change(thinner)
    if problem.how.method == "ties":
        problem.how = replace(problem.how, options={"density": 1.0})


FAULTS: dict[str, Fault] = {
    "nothing": lambda problem: None,
    "alpha 1e-38 to 1e38": scales(1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e38),
    "alpha 1e-320 to 1e300": scales(1e-320, 1e-160, 1e-130, 1e-100, 1e-70, 1e70, 1e100, 1e130, 1e160, 1e300),
    "float16: 65504, denormals": half_extremes,
    "bfloat16, float32: 3e38, denormals": wide_extremes,
    "the result does not fit its dtype": misfit,
    "one adapter 1e4 to 1e16 times the others": huge_neighbour,
    "factors of one adapter 1e20 to 1e32 apart": skewed,
    "NaN in one module": spoilt(float("nan")),
    "infinity in one module": spoilt(float("inf")),
    "zero modules in one adapter": zero(1),
    "zero modules in all adapters": zero(),
    "singular values all equal": equal_values,
    "the same adapter several times": duplicates,
    "isotropized adapters again": flattened,
    "weights zero, negative": weights(0.0, -1.0, 0.5, -0.0),
    "weights 1e-30 to 1e30": weights(1e-30, 1e-14, 1.0, -1e14, 1e30),
    "weights 1e-300 to 1e300": weights(1e-300, -1e-160, 1.0, 1e160, 1e300),
    "scale 0, negative, 1e-30 to 1e30": overall(0.0, -2.0, 1e-30, -1e30),
    "scale 1e-300 to 1e300": overall(1e-300, 1e-150, -1e150, 1e300),
    "ranks above the dimensions": tall_ranks,
    "factors short of rank": deficient,
}
