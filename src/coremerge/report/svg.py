"""Plots as inline SVG: colours from the page's style, so that they follow light and dark; values on hovering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CELL, GAP, LETTER = 26, 2, 6.6
"""Pixels of a heat map's cell, between cells, and of a letter at the plots' size."""

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


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    colours: Range,
    *,
    cell: int = CELL,
) -> Markup:
    """A cell for each row and column; empty where there is no value."""
    left = max((len(row) for row in rows), default=0) * LETTER + 10
    top = max((len(column) for column in columns), default=0) * LETTER * 0.75 + 14
    width, height = left + len(columns) * cell + 60, top + len(rows) * cell + 6
    parts = []
    for i, row in enumerate(rows):
        y = top + i * cell
        parts.append(_text(left - 6, y + cell / 2 + 4, row, "end"))
        for j, column in enumerate(columns):
            place = f'x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - GAP}" height="{cell - GAP}"'
            middle = left + j * cell + (cell - GAP) / 2, y + (cell - GAP) / 2 + 3.5
            parts.append(_cell(f"{row}, {column}", values[i][j], colours, place, middle if cell >= CELL else None))
    for j, column in enumerate(columns):
        x = left + j * cell + cell / 2
        parts.append(f'<g transform="translate({x:.1f} {top - 6:.1f}) rotate(-48)">{_text(0, 0, column, "start")}</g>')
    return _svg(width, height, parts)


def _cell(title: str, value: Number, colours: Range, place: str, middle: tuple[float, float] | None) -> str:
    """``middle``: of its number, where there is room for one."""
    if value is None or math.isnan(value):
        return f'<rect class="none" {place}><title>{escape(title)}: none</title></rect>'
    share, shown = colours.share(value), colours.show(value)
    shown = shown.lstrip("-") if float(shown) == 0 else shown
    hue = "negative" if value < 0 else "positive"
    number = ""
    if middle:
        ink = "on-full" if share > 0.55 else "on-pale"
        brief = shown.replace("0.", ".", 1) if abs(value) < 1 and len(shown) > 3 else shown
        x, y = middle
        number = f'<text class="value {ink}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(brief)}</text>'
    return (
        f'<g class="cell"><rect class="empty" {place}/><rect class="{hue}" {place} fill-opacity="{share:.3f}"/>'
        f"{number}<title>{escape(title)}: {escape(shown)}</title></g>"
    )


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


def bars(rows: Sequence[tuple[str, float, tuple[float, float] | None]], *, width: int = 640) -> Markup:
    """A bar a row from zero, with its interval where there is one."""
    left = max((len(label) for label, _, _ in rows), default=0) * LETTER + 10
    high = max((max(value, interval[1] if interval else value) for _, value, interval in rows), default=1) or 1
    scale, parts = (width - left - 60) / high, []
    for i, (label, value, interval) in enumerate(rows):
        y = 4 + i * 24
        parts.append(_text(left - 6, y + 14, label, "end"))
        title = f"{label}: {value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
        place = f'x="{left:.1f}" y="{y}" width="{max(0, value) * scale:.1f}" height="18"'
        bar = f'<rect class="positive" {place} fill-opacity="0.8"/>'
        parts.append(f'<g class="cell">{bar}<title>{escape(title)}</title></g>')
        if interval:
            a, b = (left + max(0, end) * scale for end in interval)
            parts.append(f'<line class="whisker" x1="{a:.1f}" x2="{b:.1f}" y1="{y + 9}" y2="{y + 9}"/>')
        end = max(value, interval[1] if interval else value)
        parts.append(_text(left + max(0, end) * scale + 6, y + 14, f"{value:.3f}", "start"))
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
