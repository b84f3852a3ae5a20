"""A section of the report, and its plots' rows and columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from markupsafe import Markup

from coremerge.report import svg
from coremerge.report.gather import Place

T = TypeVar("T")
Cells = list[list[list[T]]]
"""Row by row and column by column, what belongs to the modules there."""

WIDTH = 900
"""Pixels that the cells of a heat map have side by side."""


@dataclass(frozen=True)
class Table:
    """Of a section.

    Attributes:
        headings: of the columns; a second line in one is its unit.
        rows: of cells.
        groups: headings over the headings, and how many of these each is over.
        numbers: columns whose cells end on one line.
        long: columns whose words may break.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    numbers: Collection[int] = ()
    long: Collection[int] = (0,)


@dataclass(frozen=True)
class Part:
    """One section.

    Attributes:
        title: its heading.
        text: what is seen in it, in a sentence or two.
        figures: caption and picture of each plot.
        table: where there is one.
        items: a list, where there is one.
    """

    title: str
    text: str = ""
    figures: Sequence[tuple[str, Markup]] = ()
    table: Table | None = None
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Blocks:
    """Heat maps whose columns are a model's blocks.

    Args:
        places: module → where it is: see :func:`~coremerge.report.gather.places_of`.
    """

    places: Mapping[str, Place]

    @cached_property
    def _keys(self) -> list[tuple[str, int | str]]:
        """Stacks in the modules' order, blocks in order; then modules outside of any, by their kind."""
        stacks = list(dict.fromkeys(place.stack for place in self.places.values()))
        inside = {(place.stack, place.layer) for place in self.places.values() if place.layer is not None}
        outside = {place.kind for place in self.places.values() if place.layer is None}
        ordered = sorted(inside, key=lambda key: (stacks.index(key[0]), key[1]))
        return [*ordered, *(("", kind) for kind in sorted(outside))]

    @cached_property
    def columns(self) -> list[svg.Column]:
        """Of every map."""
        return [svg.Column(f"{stack} {block}".strip(), str(block), stack) for stack, block in self._keys]

    @cached_property
    def kinds(self) -> list[str]:
        """In the modules' order."""
        return list(dict.fromkeys(place.kind for place in self.places.values()))

    @property
    def cell(self) -> int:
        """A cell's size."""
        return max(9, min(svg.CELL, WIDTH // max(1, len(self.columns))))

    def by_row(self, rows: Sequence[Mapping[str, T]]) -> Cells[T]:
        """One row for each of ``rows`` (module → value)."""
        found: Cells[T] = [[[] for _ in self._keys] for _ in rows]
        for i, row in enumerate(rows):
            for module, value in row.items():
                if module in self.places:
                    found[i][self._column(module)].append(value)
        return found

    def by_kind(self, values: Mapping[str, T]) -> Cells[T]:
        """One row for each kind of module."""
        kinds = {module: place.kind for module, place in self.places.items()}
        return self.by_row([{m: v for m, v in values.items() if kinds.get(m) == kind} for kind in self.kinds])

    def _column(self, module: str) -> int:
        place = self.places[module]
        return self._at[(place.stack if place.layer is not None else "", self._block(place))]

    @cached_property
    def _at(self) -> dict[tuple[str, int | str], int]:
        return {key: at for at, key in enumerate(self._keys)}

    @staticmethod
    def _block(place: Place) -> int | str:
        return place.kind if place.layer is None else place.layer

    def kind_map(
        self,
        values: Mapping[str, float],
        colours: svg.Range,
        *,
        said: Mapping[tuple[int, int], str] | None = None,
        ringed: Collection[tuple[int, int]] = (),
    ) -> Markup:
        """Means by kind of module and block: see :func:`coremerge.report.svg.heatmap`."""
        return self.drawn(self.kinds, means(self.by_kind(values)), colours, said=said, ringed=ringed)

    def drawn(
        self,
        rows: Sequence[str],
        values: Sequence[Sequence[svg.Number]],
        colours: svg.Range,
        *,
        said: Mapping[tuple[int, int], str] | None = None,
        ringed: Collection[tuple[int, int]] = (),
    ) -> Markup:
        """A heat map with these columns."""
        return svg.heatmap(rows, self.columns, values, colours, cell=self.cell, said=said, ringed=ringed)


def means(cells: Cells[float]) -> list[list[svg.Number]]:
    """One number a cell; None where there is none."""
    return [[mean(listed) for listed in row] for row in cells]


def mean(values: Sequence[float]) -> float | None:
    """None of none."""
    return sum(values) / len(values) if values else None
