"""How weights are learned, and presets of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from coremerge.errors import ConfigError
from coremerge.learning.blocks import ALL, LAST_QUARTER

Per = Literal["adapter", "module", "component"]


@dataclass(frozen=True)
class Settings:
    """How weights are learned.

    Attributes:
        objective: ``match``, ``nsc-own``, ``nsc`` or ``entropy``: see :mod:`coremerge.learning.objectives`.
        steps: of the optimiser, each over one batch of every task.
        rate: learning rate.
        start: of every coefficient; None: 2.4 / T, the paper's, but at most 1.
        modules: that are measured: see :func:`~coremerge.learning.blocks.choose_modules`. All have coefficients.
        per: one coefficient per ``adapter``, per adapter and ``module``, or per rank ``component``.
        pull: weight of the mean squared distance to the start in the objective.
        bounds: that coefficients are kept within, or None.
        fixed_total: keep the sum of each module's coefficients (of all, if they are per adapter) where it starts, as
            far as bounds allow.
        decay: AdamW's weight decay, of coefficients that have an influence on what is measured.
        patience: stop after so many steps without a new best of the objective's running mean; None: never.
    """

    objective: str = "match"
    steps: int = 80
    rate: float = 2e-2
    start: float | None = None
    modules: str = ALL
    per: Per = "module"
    pull: float = 0.0
    bounds: tuple[float, float] | None = (0.0, 2.0)
    fixed_total: bool = False
    decay: float = 0.0
    patience: int | None = None


PRESETS: Mapping[str, Settings] = {
    "match": Settings(),
    "nsc-own": Settings("nsc-own", 100, 1e-2, bounds=None),
    "vision": Settings("nsc", 100, 1e-3, modules=LAST_QUARTER, bounds=None, decay=0.01),
    "language": Settings("nsc", 500, 3e-4, modules=LAST_QUARTER, bounds=None, decay=0.01),
}
"""``vision`` and ``language``: NSC at the settings of its paper."""

OF_MODEL = ("nsc", "entropy")
"""Objectives whose preset is that of the model's kind."""
OBJECTIVES = ("nsc-own", "match", *OF_MODEL)
DEFAULT = Settings.objective
"""Never far below its start in any of four worlds, as ``nsc-own`` is on vision and generation: docs/evidence.md."""


def settle(
    objective: str | None,
    preset: str | Settings | None,
    changes: Mapping[str, Any],
    count: int,
    *,
    language: bool = False,
) -> Settings:
    """The settings for ``count`` adapters: those of the preset, with ``changes`` and a start.

    Args:
        objective: by default the preset's.
        preset: by default the one that goes with the objective; of NSC's, with the model's kind.
        changes: settings by name.
        count: of adapters.
        language: the model reads text.

    Raises:
        ConfigError: an unknown preset, setting or objective.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ConfigError("no such preset", key="preset", value=preset, remedy=f"Known: {', '.join(PRESETS)}")
    chosen = preset or _preset_of(objective or DEFAULT, language)
    settings = PRESETS[chosen] if isinstance(chosen, str) else chosen
    unknown = [key for key in changes if key not in asdict(settings)]
    if unknown:
        raise ConfigError("no such setting", key=unknown[0], remedy=f"Known: {', '.join(asdict(settings))}")
    settings = replace(settings, objective=objective or settings.objective, **changes)
    if settings.objective not in OBJECTIVES:
        raise ConfigError(
            "no such objective", key="objective", value=settings.objective, remedy=f"Known: {', '.join(OBJECTIVES)}"
        )
    return settings if settings.start is not None else replace(settings, start=min(1.0, 2.4 / count))


def _preset_of(objective: str, language: bool) -> str:
    if objective in OF_MODEL:
        return "language" if language else "vision"
    return objective if objective in PRESETS else DEFAULT
