"""What the laws are tried on: generated updates and adapters of known structure, and changes that must not matter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
from coremerge.merging import MergeResult, merge
from coremerge.recipe import Recipe
from coremerge.registry import Entry, Spec
from coremerge.spaces import SPACES
from tolerances import DOUBLE

settings.register_profile(
    "coremerge",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("coremerge")

KINDS = (
    "plain",
    "zero",
    "deficient",
    "deficient right",
    "duplicate",
    "same right",
    "same left",
    "tiny",
    "huge",
    "empty",
    "skewed",
)


@dataclass(frozen=True)
class Normal:
    """Reproducible random matrices."""

    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def normal(seed: int = 0) -> Normal:
    return Normal(torch.Generator().manual_seed(seed))


def lowrank(m: int, n: int, r: int, seed: int = 0) -> LowRank:
    draw = normal(seed)
    return LowRank(draw(m, r), draw(r, n))


def make(kind: str, m: int, n: int, r: int, draw: Normal, before: Sequence[LowRank]) -> LowRank:  # noqa: PLR0917
    """One update (m, n) of inner width r with the structure its ``kind`` names."""
    left, right = draw(m, r), draw(r, n)
    match kind:
        case "zero":
            left = left * 0
        case "deficient":
            left = left[:, :1] @ draw(1, r)
        case "deficient right":
            right = draw(r, 1) @ right[:1]
        case "duplicate" if before:
            return before[-1]
        case "same right" if before:
            return LowRank(draw(m, before[0].rank), before[0].right)
        case "same left" if before:
            return LowRank(before[0].left, draw(before[0].rank, n))
        case "tiny":
            left = left * 1e-3
        case "huge":
            right = right * 1e3
        case "skewed":
            left, right = left * 1e3, right * 1e-3
        case "empty":
            return LowRank.zeros(m, n)
    return LowRank(left, right)


@st.composite
def stacks(
    draw: st.DrawFn, kinds: Sequence[str] = KINDS, tasks: tuple[int, int] = (1, 4), low: int = 3, high: int = 12
) -> list[LowRank]:
    """The updates of one module: mixed ranks, zero, rank-deficient, duplicate, shared factors, scales far apart."""
    m, n = draw(st.integers(low, high)), draw(st.integers(low, high))
    normals = normal(draw(st.integers(0, 2**16)))
    updates: list[LowRank] = []
    for kind in draw(st.lists(st.sampled_from(list(kinds)), min_size=tasks[0], max_size=tasks[1])):
        updates.append(make(kind, m, n, draw(st.integers(1, 5)), normals, updates))
    return updates


@st.composite
def adapter_sets(draw: st.DrawFn, kinds: Sequence[str] = KINDS, tasks: tuple[int, int] = (1, 4)) -> list[Adapter]:
    """Adapters a0, a1, … over up to three modules; from the second adapter on, modules may be missing."""
    shapes = {f"m{i}": (draw(st.integers(3, 10)), draw(st.integers(3, 10))) for i in range(draw(st.integers(1, 3)))}
    normals = normal(draw(st.integers(0, 2**16)))
    made: dict[str, list[LowRank]] = {name: [] for name in shapes}
    adapters = []
    for t in range(draw(st.integers(*tasks))):
        held = {}
        for name, (m, n) in shapes.items():
            if t == 0 or name == "m0" or draw(st.booleans()):
                kind = draw(st.sampled_from(list(kinds)))
                made[name].append(make(kind, m, n, draw(st.integers(1, 4)), normals, made[name]))
                held[name] = made[name][-1]
        adapters.append(Adapter.from_updates(held, name=f"a{t}"))
    return adapters


def one(update: LowRank, name: str = "adapter") -> Adapter:
    """An adapter with the one module ``layer``."""
    return Adapter.from_updates({"layer": update}, name=name)


def named(updates: Sequence[LowRank]) -> dict[str, Adapter]:
    return {f"a{t}": one(update, f"a{t}") for t, update in enumerate(updates)}


def run(adapters: Sequence[Adapter] | Mapping[str, Adapter], **recipe: object) -> MergeResult:
    """Merge with scale 1 and no steps unless told, on one thread."""
    return merge(adapters, Recipe(**{"scale": 1.0, "steps": [], **recipe}), threads=1)


def merged(updates: Sequence[LowRank], **recipe: object) -> Tensor:
    """The dense result of merging one module."""
    return run(named(updates), **recipe).adapter["layer"].dense()


def dense(adapter: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {name: update.dense() for name, update in adapter.items()}


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(seed)(n, n))[0]


def regauged(update: LowRank, seed: int = 0) -> LowRank:
    """The same matrix from other factors: (left·G, G⁻¹·right), G invertible and far from orthogonal."""
    r = update.rank
    change = orthogonal(r, seed) * torch.logspace(-1, 1, r, dtype=torch.float64)
    return LowRank(update.left @ change, torch.linalg.solve(change, update.right))


def close(a: Tensor, b: Tensor, scale: float | None = None, tol: float = DOUBLE) -> None:
    """``a`` equals ``b`` to ``tol``, relative to the larger of both (or to ``scale``).

    More than :data:`DOUBLE`, 1e-8 to 1e-5, is for what hangs on single directions: vectors, polar factors, roots of
    sums of squares. One just above the numerical rank's cut, 1e-8 of the largest, is known to 1e-16 / 1e-8 of its own
    size, and several of them add up. Less than :data:`DIGITS` is for one adapter, which comes back through orthonormal
    bases alone. Factors that were rounded to float32 on the way are alike to :data:`SINGLE`.
    """
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    if a.numel() == 0:
        return
    size = max(a.abs().max().item(), b.abs().max().item()) if scale is None else scale
    error = (a - b).abs().max().item()
    assert error <= tol * size, f"differ by {error:.3g} where the size is {size:.3g}"


def largest(updates: Sequence[LowRank]) -> float:
    """The size against which rounding is judged."""
    return max(update.dense().abs().max().item() for update in updates) or 1.0


def examples(entry: Entry[object]) -> dict[str, object]:
    """A value for each parameter without a default."""
    return {name: 2 for name, default in entry.parameters.items() if default is inspect.Parameter.empty}


def variants(entry: Entry[object]) -> list[Spec]:
    """The entry as it is, and with each other value of its options that can be counted."""
    found: list[Spec] = [{entry.name: examples(entry)}]
    for key, hint in get_type_hints(entry.factory).items():
        values = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        found += [{entry.name: examples(entry) | {key: v}} for v in values if v != entry.parameters.get(key)]
    return found


def label(value: object) -> str:
    if isinstance(value, dict):
        return "-".join([*value, *(f"{k}={v}" for options in value.values() for k, v in options.items())])
    return "+".join(map(label, value)) or "none" if isinstance(value, tuple) else str(value)


SPACE_SPECS = list(chain.from_iterable(variants(SPACES[name]) for name in SPACES))

BASIC = ("sum", "mean", "ties", "dare", "dare_ties", "tsv", "cart")
BASIC_STEPS = ("isotropize", "truncate", "balance")
"""Methods and steps of whose parts the others are made: these are tried in all combinations, the others in pairs."""
