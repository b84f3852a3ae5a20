"""Plots as inline SVG: colours from the page's style, so that they follow light and dark; values on hovering."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

CELL, GAP, LETTER = 30, 2, 6.6
"""Pixels of a heat map's cell, between cells, and of a letter at the plots' size."""

ROOM, LINE = 28, 14
"""A cell of the one size has room for its number; one of the other height, for its row's name beside it."""

HUES = 8
"""That the page's style has for lines."""

Number = float | None


@dataclass(frozen=True)
class Range:
    """What a heat map's colours stand for: pale at zero or ``low``, full at ``high``; negative ones in another hue."""

    low: float
    high: float
    show: Callable[[float], str] = "{:.2f}".format

    def share(self, value: float) -> float:
        """How full the colour is, 0 to 1."""
        if value < 0:
            return min(1.0, value / self.low) if self.low < 0 else 0.0
        base = max(self.low, 0.0)
        return min(1.0, max(0.0, (value - base) / ((self.high - base) or 1.0)))


@dataclass(frozen=True)
class Column:
    """Of a heat map.

    Attributes:
        name: said on hovering.
        head: what stands above it.
        over: what stands above its head and those of its neighbours that have the same.
    """

    name: str
    head: str
    over: str = ""


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str | Column],
    values: Sequence[Sequence[Number]],
    colours: Range,
    *,
    cell: int = CELL,
    said: Mapping[tuple[int, int], str] | None = None,
    ringed: Collection[tuple[int, int]] = (),
) -> Markup:
    """A cell for each row and column; empty where there is no value.

    Args:
        rows: their names.
        columns: their names.
        values: row by row.
        colours: what they stand for.
        cell: its width, and its height if a row's name fits beside it.
        said: what else is said on hovering: (row, column) → words.
        ringed: cells (row, column) that have a ring.
    """
    heads = [Column(column, column) if isinstance(column, str) else column for column in columns]
    left = max((len(row) for row in rows), default=0) * LETTER + 10
    above, top, right = _heads(heads, left, cell)
    tall = max(cell, LINE)
    width, height = left + len(heads) * cell + right, top + len(rows) * tall + 6
    parts = []
    for i, row in enumerate(rows):
        y = top + i * tall
        parts.append(_text(left - 6, y + tall / 2 + 3, row, "end"))
        for j, column in enumerate(heads):
            place = f'x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - GAP}" height="{tall - GAP}"'
            middle = left + j * cell + (cell - GAP) / 2, y + (cell - GAP) / 2 + 4
            title = f"{row}, {column.name}"
            more = (said or {}).get((i, j), "")
            parts.append(_cell(title, values[i][j], colours, place, middle if cell >= ROOM else None, more=more))
            if (i, j) in ringed:
                parts.append(f'<rect class="ring" {place}/>')
    return _svg(width, height, [*parts, *above])


def _heads(columns: Sequence[Column], left: float, cell: int) -> tuple[list[str], float, float]:
    """What stands above the cells, its height, and how far it leans out on the right.

    Numbers stand upright, as many as there is room for; words lean if one of them has no room.
    """
    numbers = [column.head for column in columns if column.head.isdecimal()]
    words = [column.head for column in columns if not column.head.isdecimal()]
    step = math.ceil((_longest(numbers) + 3) / cell)
    leaning = _longest(words) if _longest(words) > cell else 0.0
    top = (18 if any(column.over for column in columns) else 0) + max(20.0, leaning * 0.75 + 14)
    parts = []
    for j, column in enumerate(columns):
        x, number = left + j * cell + (cell - GAP) / 2, column.head.isdecimal()
        if leaning and not number:
            head = _text(0, 0, column.head, "start")
            parts.append(f'<g transform="translate({x + 3:.1f} {top - 6:.1f}) rotate(-48)">{head}</g>')
        elif not number or int(column.head) % step == 0:
            parts.append(_text(x, top - 6, column.head, "middle"))
    return [*parts, *_over(columns, left, top, cell)], top, leaning * 0.67 + 6


def _longest(heads: Sequence[str]) -> float:
    return max(map(len, heads), default=0) * LETTER


def _over(columns: Sequence[Column], left: float, top: float, cell: int) -> Iterator[str]:
    """What neighbours have in common, above a line."""
    start = 0
    for name, group in groupby(column.over for column in columns):
        count = len(list(group))
        a, b = left + start * cell, left + (start + count) * cell - GAP
        if name:
            y = top - 19
            yield f'<line class="grid" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield _text(a, y - 5, name, "start")
        start += count


def _cell(
    title: str, value: Number, colours: Range, place: str, middle: tuple[float, float] | None, *, more: str
) -> str:
    """``middle``: of its number, where there is room for one."""
    more = f" ({more})" if more else ""
    if value is None or math.isnan(value):
        return f'<rect class="none" {place}><title>{escape(title)}: none{escape(more)}</title></rect>'
    share, shown = colours.share(value), colours.show(value)
    shown = shown.lstrip("-") if float(shown) == 0 else shown
    hue = "negative" if value < 0 else "positive"
    number = ""
    if middle:
        ink = "on-full" if share > 0.55 else "on-pale"
        x, y = middle
        number = (
            f'<text class="value {ink}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(_brief(shown))}</text>'
        )
    return (
        f'<g class="cell"><rect class="empty" {place}/><rect class="{hue}" {place} fill-opacity="{share:.3f}"/>'
        f"{number}<title>{escape(title)}: {escape(shown)}{escape(more)}</title></g>"
    )


def _brief(shown: str) -> str:
    """At most four characters, where that can be.

    Example:
        >>> [_brief(text) for text in ("0.54", "-0.25", "1.00", "12.34", "-1.25", "8")]
        ['.54', '-.25', '1.00', '12.3', '-1.2', '8']
    """
    if len(shown) > 3 and shown.startswith(("0.", "-0.")):
        return shown.replace("0.", ".", 1)
    return shown if len(shown) <= 4 else f"{float(shown):.{2 if shown.startswith('-') else 3}g}"


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    start: int = 1,
    width: int = 640,
    height: int = 260,
    main: str | None = None,
) -> Markup:
    """One line a series over start, start + 1, ...; from zero upwards unless values are negative.

    ``main`` is drawn in the text's colour, the others each in one of its own.
    """
    every = [value for values in series.values() for value in values if not math.isnan(value)]
    longest = max((len(values) for values in series.values()), default=0)
    if not every or longest == 0:
        return Markup("")
    low, high = min(0.0, *every), max(every) or 1.0
    left, right, top, bottom = 56, 12, 10, 40
    span = (high - low) or 1.0

    def at(i: float, value: float) -> tuple[float, float]:
        share = i / max(1, longest - 1)
        return left + share * (width - left - right), top + (high - value) / span * (height - top - bottom)

    parts = []
    for tick in ticks(low, high):
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    for tick in ticks(start, start + longest - 1):
        if float(tick).is_integer():
            x, _ = at(tick - start, low)
            parts.append(_text(x, height - bottom + 16, f"{tick:g}", "middle"))
    for place, (name, values) in enumerate(series.items()):
        points = [at(i, value) for i, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<g class="series {_hue(name, place, main)}"><polyline points="{path}"/>')
        few = len(values) <= 80
        for i, ((x, y), value) in enumerate(zip(points, values, strict=True)):
            if few or i % (len(values) // 40) == 0 or i == len(values) - 1:
                title = f"{name}, {x_label} {start + i}: {value:.4g}"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(title)}</title></circle>')
        parts.append("</g>")
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    middle = (top + height - bottom) / 2
    parts.append(f'<g transform="translate(12 {middle:.0f}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>')
    return _svg(width, height, parts) + legend(list(series), main)


def _hue(name: str, place: int, main: str | None) -> str:
    return "main" if name == main else f"s{place % HUES}"


def legend(names: Sequence[str], main: str | None = None) -> Markup:
    """Names beside their lines' colours."""
    items = "".join(f'<li class="{_hue(name, i, main)}">{escape(name)}</li>' for i, name in enumerate(names))
    return Markup(f'<ul class="legend">{items}</ul>')


def bars(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    *,
    width: int = 460,
    show: Callable[[float], str] = "{:.3f}".format,
) -> Markup:
    """A bar a row from zero, with its interval where there is one."""
    left = max((len(label) for label, _, _ in rows), default=0) * LETTER + 10
    high = max((max(value, interval[1] if interval else value) for _, value, interval in rows), default=1) or 1
    scale, parts = (width - left - 60) / high, []
    for i, (label, value, interval) in enumerate(rows):
        y = 4 + i * 24
        parts.append(_text(left - 6, y + 14, label, "end"))
        title = f"{label}: {show(value)}" + (f" ({show(interval[0])} to {show(interval[1])})" if interval else "")
        place = f'x="{left:.1f}" y="{y}" width="{max(0, value) * scale:.1f}" height="18"'
        bar = f'<rect class="positive" {place} fill-opacity="0.8"/>'
        parts.append(f'<g class="cell">{bar}<title>{escape(title)}</title></g>')
        if interval:
            a, b = (left + max(0, end) * scale for end in interval)
            parts.append(f'<line class="whisker" x1="{a:.1f}" x2="{b:.1f}" y1="{y + 9}" y2="{y + 9}"/>')
        end = max(value, interval[1] if interval else value)
        parts.append(_text(left + max(0, end) * scale + 6, y + 14, show(value), "start"))
    return _svg(width, 24 * len(rows) + 8, parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    Example:
        >>> ticks(0, 1), ticks(1, 32)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [10.0, 20.0, 30.0])
    """
    if high <= low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img">'
        + "".join(parts)
        + "</svg>"
    )
