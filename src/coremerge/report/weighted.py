"""The report of merge weights: by adapter, by block, and their path while they were learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from coremerge.report import svg
from coremerge.report.part import Blocks, Part, Table, means

if TYPE_CHECKING:
    from coremerge.learning.result import Weights


def weighted(record: Mapping[str, Any], blocks: Blocks, learned: Weights | None) -> Iterator[Part]:
    """A section, if weights were given."""
    table, plain = record["recipe"]["weights"], plain_weights(record)
    figures: list[tuple[str, Markup]] = []
    if isinstance(table, Mapping) and any(isinstance(value, Mapping) for value in table.values()):
        figures.append(("weights by block", _weight_map(table, blocks)))
    rows = [[name, f"{value:.4g}"] for name, value in plain.items()] if not figures else []
    if learned is not None:
        figures += _paths(learned)
    if figures or rows:
        yield Part("Weights", figures=figures, table=Table(["adapter", "weight"], rows, numbers=[1]) if rows else None)


def plain_weights(record: Mapping[str, Any]) -> dict[str, float]:
    """Adapter → weight, of those that have one for all modules."""
    table = record["recipe"]["weights"]
    if isinstance(table, Mapping):
        named = table.items()
    else:
        named = {entry["name"]: value for entry, value in zip(record["inputs"], table or [], strict=False)}.items()
    return {str(name): value for name, value in named if isinstance(value, (int, float))}


def _weight_map(table: Mapping[str, Any], blocks: Blocks) -> Markup:
    rows = [row if isinstance(row, Mapping) else dict.fromkeys(blocks.places, row) for row in table.values()]
    values = means([[[x for value in cell for x in _many(value)] for cell in row] for row in blocks.by_row(rows)])
    high = max((abs(value) for row in values for value in row if value is not None), default=1.0) or 1.0
    return blocks.drawn(list(table), values, svg.Range(-high, high))


def _many(value: float | Sequence[float]) -> Sequence[float]:
    """The weights of one module, whether it has one or one per rank component."""
    return value if isinstance(value, Sequence) else [value]


def _paths(learned: Weights) -> Iterator[tuple[str, Markup]]:
    if len(learned.objective):
        series = {task: learned.objective[:, i].tolist() for i, task in enumerate(learned.tasks)}
        yield "objective while learning", svg.lines(series, x_label="step", y_label=str(learned.settings["objective"]))
    counts = [sum(len(_many(v)) for v in row.values()) for row in learned.table.values()]
    if learned.path.shape[-1] == sum(counts) and len(learned.path) > 1:
        parts = torch.split(learned.path, counts, dim=-1)
        averages = [part.mean(-1).tolist() for part in parts if part.shape[-1]]
        series = dict(
            zip((name for name, count in zip(learned.table, counts, strict=True) if count), averages, strict=True)
        )
        yield "mean weight while learning", svg.lines(series, x_label="step", y_label="weight", start=0)
