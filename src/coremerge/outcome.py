"""What there is to say of a merge: of each module, of all of them, and the scale that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from coremerge.equal import counting, held_back
from coremerge.errors import ConfigError
from coremerge.plan import Plan
from coremerge.recipe import Resolved
from coremerge.zeros import CANCELLED, found_zeros, heaviest

FLAT = 0.1
"""A cut to ``rank`` that loses more than this share of the energy is warned of."""


FEW = 0.5
"""A method that keeps less than this share of an adapter's energy is warned of: most of the adapter is not there."""


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        shape: (out, in).
        ranks: adapter name → rank.
        merged_rank: numerical rank of the merged update.
        rank: of the written update.
        energy: squared Frobenius norm of the merged update, before the overall scale.
        lost: share of the energy that the cut to ``rank`` lost.
        input_norm: mean spectral norm of the inputs' updates, of those that are not zero next to the largest, nor have
            weight 0.
        input_frobenius: their mean Frobenius norm.
        norm: spectral norm of the merged update, before the overall scale.
        input_energy: adapter name → squared Frobenius norm of its update, where the space or the method keeps only some
            directions.
        input_kept: adapter name → of that, what those directions have.
        zero: names of the adapters whose update is zero here.
        alone: there was one update to merge, which was taken as it is but for what a person named.
        squares: adapter name → squared Frobenius norm of its weighted update, where the scale goes by the base.
        along: adapter name → inner product of that with the merged update, before the overall scale; likewise.
    """

    shape: tuple[int, int]
    ranks: Mapping[str, int]
    merged_rank: int
    rank: int
    energy: float
    lost: float
    input_norm: float
    input_frobenius: float
    norm: float
    input_energy: Mapping[str, float] = field(default_factory=dict)
    input_kept: Mapping[str, float] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    alone: bool = False
    squares: Mapping[str, float] = field(default_factory=dict)
    along: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a merge did.

    Attributes:
        scale: the overall factor that was applied.
        rank: the result's (largest) rank.
        lost: share of the whole energy that the cut to ``rank`` lost.
        seconds: spent on the cores (reading and lifting the factors happens when the adapter is used or saved).
        modules: module name → :class:`ModuleReport`.
        warnings: in plain words.
        made: how, where it was not by the plan's recipe alone.
        norm_factors: adapter name → what brought its norm to that of the others: see :mod:`coremerge.equal`.
    """

    scale: float
    rank: int
    lost: float
    seconds: float
    modules: Mapping[str, ModuleReport]
    warnings: tuple[str, ...]
    made: str | None = None
    norm_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def alone(self) -> int:
        """In how many modules there was one update to merge, which was taken as it is."""
        return sum(module.alone for module in self.modules.values())

    @property
    def input_kept(self) -> dict[str, float]:
        """Adapter name → share of its energy in the directions that are kept of it; empty: all are."""
        modules = self.modules.values()
        names = dict.fromkeys(name for module in modules for name in module.input_energy)
        energy = {name: sum(module.input_energy.get(name, 0.0) for module in modules) for name in names}
        kept = {name: sum(module.input_kept.get(name, 0.0) for module in modules) for name in names}
        return {name: kept[name] / whole if whole else 1.0 for name, whole in energy.items()}

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "scale": self.scale,
            "rank": self.rank,
            "energy_lost": self.lost,
            "norm_factors": dict(self.norm_factors),
            "input_kept": self.input_kept,
            "seconds": self.seconds,
            "modules": {name: _plain(module) for name, module in self.modules.items()},
            "warnings": list(self.warnings),
            "made": self.made,
        }


def _plain(module: ModuleReport) -> dict[str, Any]:
    return vars(module) | {"ranks": dict(module.ranks), "zero": list(module.zero)}


def report_of(plan: Plan, modules: Mapping[str, ModuleReport], scale: float, seconds: float) -> Report:
    """What there is to say of all of the plan's ``modules``."""
    energy = sum(m.energy for m in modules.values())
    lost = sum(m.lost * m.energy for m in modules.values()) / energy if energy else 0.0
    rank = max(m.rank for m in modules.values())
    warnings = [*plan.warnings, *found_zeros(plan, modules), *held_back(plan.equal)]
    if few := _few(Report(scale, rank, lost, seconds, modules, ()).input_kept):
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in few.items())
        keeper = f"the space {plan.resolved.space}" if plan.resolved.space.cuts else plan.resolved.method
        warnings.append(f"{keeper} keeps less than {FEW:.0%} of the energy of some adapters ({shares})")
    factors = {name: one.factor for name, one in plan.equal.items()}
    report = Report(scale, rank, lost, seconds, dict(modules), tuple(warnings), norm_factors=factors)
    return replace(report, warnings=(*warnings, *_cut_short(plan, report)))


def _cut_short(plan: Plan, report: Report) -> Iterator[str]:
    if report.lost > FLAT:
        flat = [step for step in _acting(plan, report).steps if step.entry.flattens]
        yield (
            f"the cut to rank {report.rank} loses {report.lost:.0%} of the merged update's energy"
            + (": a flat spectrum does not truncate well" if flat else "")
            + "; give a higher --rank"
            + (f", or leave out {flat[0].entry.name}" if flat else "")
        )


def _acting(plan: Plan, report: Report) -> Resolved:
    """What was applied: less than the recipe where there was one update to merge everywhere."""
    everywhere = report.alone == len(report.modules)
    return (everywhere and plan.resolved.alone) or plan.resolved


def _few(kept: Mapping[str, float]) -> dict[str, float]:
    return {name: share for name, share in kept.items() if share < FEW}


def check_base(plan: Plan) -> None:
    """Refuse a scale by the base whose norms nobody gave.

    Raises:
        ConfigError: they are missing.
    """
    if plan.recipe.scale == "base" and not plan.modules.keys() <= plan.base_norms.keys():
        raise ConfigError(
            "the norms of the base model's weights are not known", key="scale", value="base",
            remedy="Name the base model, too (--base; in Python base_norms)",
        )  # fmt: skip


def scale_of(plan: Plan, reports: Mapping[str, ModuleReport]) -> float:
    """The overall scale that the recipe asks for."""
    if not isinstance(plan.recipe.scale, str):
        return float(plan.recipe.scale)
    scale = auto_scale(reports.values(), heaviest(plan))
    if plan.recipe.scale == "base":
        scale = min(scale, base_scale(reports, plan.base_norms))
    if math.isfinite(scale) and scale:
        return scale
    raise ConfigError(
        "weights or updates of too many sizes: no factor brings the merge to its inputs' size",
        key="scale", value=plan.recipe.scale, remedy="Check the weights, or give a --scale",
    )  # fmt: skip


def auto_scale(reports: Iterable[ModuleReport], heaviest: float = 1.0) -> float:
    """The factor that makes the product of two ratios 1: of spectral and of Frobenius norms, merged over inputs' mean.

    Each ratio is a mean over modules; those without any update do not count. A flat spectrum has a large Frobenius
    norm for its spectral one, a merge of few adapters small ones of both: one norm alone does not see both. The inputs
    are the equal ones, where norms are made equal.
    ``heaviest`` is the largest weight: what has cancelled out next to it has no size to bring up.

    Source: ours; docs/evidence.md compares it with scales tuned on labels.
    """
    reports = [report for report in reports if report.input_norm > 0]
    if not reports:
        return 1.0
    spectral = sum(r.norm / r.input_norm for r in reports) / len(reports)
    frobenius = sum(r.energy**0.5 / r.input_frobenius for r in reports) / len(reports)
    return 1 / (spectral * frobenius) ** 0.5 if spectral > CANCELLED * heaviest else 1.0


BEARABLE = 0.4
"""Chosen on validation rows of vision and text tasks, where more was worse, and where it is just no bound."""


def base_scale(reports: Mapping[str, ModuleReport], base_norms: Mapping[str, float]) -> float:
    """The largest factor at which a merge changes the base, beside what a task itself asks for, by :data:`BEARABLE`.

    With M_l the merged update of module l, Δ_l that of task t and W_l the base's weight, all over ‖W_l‖_F: what a task
    meets of the others is d_t² = Σ_l ‖M_l‖² − (Σ_l ⟨M_l, Δ_l⟩)² / Σ_l ‖Δ_l‖², the part of M that is not along its own
    update. The root of its mean over tasks, times the factor, is held to that; a task counts less in the mean where its
    own update is next to nothing. A single adapter and copies of one meet nothing: infinite.

    Source: ours; docs/log.md.
    """
    shares = {name: 1 / norm for name, norm in base_norms.items() if norm > 0}
    modules = [(shares.get(name, 0.0), report) for name, report in reports.items()]
    whole = sum(share * report.energy for share, report in modules)
    tasks = dict.fromkeys(key for report in reports.values() for key in report.squares)
    own = {key: sum(share * report.squares.get(key, 0.0) for share, report in modules) for key in tasks}
    inner = {key: sum(share * report.along.get(key, 0.0) for share, report in modules) for key in tasks}
    there = [key for key in tasks if own[key] > 0]
    says = counting(torch.tensor([own[key] ** 0.5 for key in there], dtype=torch.float64)).tolist()
    met = sum(say * max(0.0, whole - inner[key] ** 2 / own[key]) for key, say in zip(there, says, strict=True))
    mean = met / sum(says) if says else 0.0
    return BEARABLE / mean**0.5 if mean > CANCELLED * whole else math.inf
