"""Which scale is best: few of them are tried, as a merge's score rises and falls once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coremerge.yamlfile import Number, Whole

Score = Callable[[float], float]
"""Of a scale; higher is better."""

REACH = 16
"""No scale by factors further than so many times the start, in either direction."""
ROUNDING = 1 + 1e-9


class Scales(BaseModel):
    """Which scales are tried for one merge.

    Attributes:
        start: the first one, as a number or ``auto``.
        factor: each next one is this many times the last.
        step: or this much more than the last.
        both: downwards, too.
        patience: scales in a row that are no better before it stops.
        largest: no scale above.
        values: or exactly these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Number | Literal["auto"] = "auto"
    factor: Number | None = Field(default=None, gt=1)
    step: Number | None = Field(default=None, gt=0)
    both: bool = True
    patience: Whole = Field(default=1, ge=1)
    largest: Number | None = Field(default=None, gt=0)
    values: tuple[Number, ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Scales:
        if self.step is not None and self.factor is not None:
            raise ValueError("either factor or step, not both")
        return self


def walk(score: Score, scales: Scales, auto: float = 1.0) -> tuple[float, float]:
    """The best scale of those that ``scales`` has tried, and its score.

    From the start upwards until ``patience`` scales in a row are no better than the best; then downwards, if both.

    Args:
        score: of a scale.
        scales: which are tried.
        auto: what ``auto`` stands for.
    """
    if scales.values is not None:
        found = {scale: score(scale) for scale in scales.values}
        best = max(found, key=lambda scale: found[scale])
        return best, found[best]
    start = auto if scales.start == "auto" else scales.start
    found = {start: score(start)}
    for direction in (1, -1) if scales.both else (1,):
        _climb(score, found, start, onwards(start, scales, direction), scales.patience)
    best = max(found, key=lambda scale: found[scale])
    return best, found[best]


def onwards(start: float, scales: Scales, direction: int) -> Iterator[float]:
    """The scales after ``start``, up (1) or down (-1)."""
    factor = scales.factor or 2**0.5
    for count in itertools.count(1):
        if scales.step is None:
            scale = start * factor ** (direction * count)
            within = count * math.log(factor) <= math.log(REACH) * ROUNDING
        else:
            scale = round(start + direction * count * scales.step, 12)
            within = scale > 0
        if not within or (scales.largest is not None and scale > scales.largest):
            return
        yield scale


def _climb(score: Score, found: dict[float, float], start: float, scales: Iterator[float], patience: int) -> None:
    best, falls = found[start], 0
    for scale in scales:
        found[scale] = score(scale)
        falls = falls + 1 if found[scale] <= best else 0
        best = max(best, found[scale])
        if falls >= patience:
            return
