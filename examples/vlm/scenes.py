"""Small scenes: one to five equal shapes and a pink dot on a grey ground, and what there is to say about them.

Everything follows from the random generator that is given: the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 84
"""Pixels a side: six patches of 14."""

SCALE = 4
"""Shapes are drawn so many times as large, then scaled down."""

COLOURS = {
    "red": (205, 35, 35),
    "orange": (240, 135, 20),
    "yellow": (240, 220, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 205),
    "purple": (135, 50, 160),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""The cells of a grid of three by three, row by row."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZES = {"small": (6.0, 7.5), "large": (10.5, 12.0)}
"""Radii in pixels, from and to."""

PINK, DOT = (250, 120, 190), 4.5
Points = list[tuple[float, float]]


def _regular(corners: int, turn: float) -> Points:
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return [(float(np.sin(a)), float(-np.cos(a))) for a in angles]


def _star(turn: float) -> Points:
    outer, inner = _regular(5, turn), _regular(5, turn + np.pi / 5)
    return [point for tip, dent in zip(outer, inner, strict=True) for point in (tip, (dent[0] * 0.42, dent[1] * 0.42))]


def _cross(turn: float) -> Points:
    w = 0.36
    plain = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    return [(x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)) for x, y in plain]


OUTLINES: dict[str, Callable[[float], Points]] = {
    "circle": lambda turn: _regular(48, turn),
    "square": lambda turn: [(x * 1.2, y * 1.2) for x, y in _regular(4, turn + np.pi / 4)],
    "triangle": lambda turn: _regular(3, turn),
    "star": _star,
    "cross": _cross,
    "ring": lambda turn: _regular(48, turn),
}
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class Scene:
    """Equal shapes, and a dot.

    Attributes:
        cells: of the shapes, indices of :data:`PLACES`.
        dot: the cell of the dot.
        picture: bytes of (84, 84, 3).
    """

    shape: str
    colour: str
    size: str
    cells: tuple[int, ...]
    dot: int
    picture: NDArray[np.uint8]

    @property
    def number(self) -> str:
        return NUMBERS[len(self.cells)]

    @property
    def noun(self) -> str:
        """The shape, in the plural where there are several."""
        return self.shape if len(self.cells) == 1 else self.shape + ("es" if self.shape == "cross" else "s")

    def caption(self) -> str:
        """Everything: three large red stars, a dot at the top left."""
        place = PLACES[self.dot]
        where = f"in the {place}" if place == "middle" else f"at the {place}"
        return f"{self.number} {self.size} {self.colour} {self.noun}, a dot {where}"


def make_scene(rng: Generator) -> Scene:
    """A scene; every property is drawn by itself."""
    shape, colour, size = (names[int(rng.integers(len(names)))] for names in (SHAPES, tuple(COLOURS), tuple(SIZES)))
    dot, *cells = rng.permutation(9)[: 1 + int(rng.integers(1, 6))].tolist()
    scene = Scene(shape, colour, size, tuple(sorted(cells)), dot, np.zeros((SIDE, SIDE, 3), np.uint8))
    return replace(scene, picture=_draw(scene, rng))


def _draw(scene: Scene, rng: Generator) -> NDArray[np.uint8]:
    canvas = _ground(rng)
    light = rng.uniform(0, 2 * np.pi)
    colour = np.array(COLOURS[scene.colour]) + rng.uniform(-12, 12, 3)
    for cell in scene.cells:
        radius = rng.uniform(*SIZES[scene.size])
        _paint(
            canvas,
            _mask(scene.shape, radius, rng.uniform(-0.3, 0.3)),
            radius,
            colour,
            middle=_middle(cell, rng),
            light=light,
        )
    _paint(canvas, _mask("circle", DOT, 0.0), DOT, np.array(PINK), middle=_middle(scene.dot, rng), light=light)
    return (canvas + rng.normal(0, 3, canvas.shape)).clip(0, 255).round().astype(np.uint8)


def _middle(cell: int, rng: Generator) -> tuple[int, int]:
    row, column = divmod(cell, 3)
    return 14 + 28 * row + int(rng.integers(-2, 3)), 14 + 28 * column + int(rng.integers(-2, 3))


def _ground(rng: Generator) -> NDArray[np.float64]:
    """A smooth grey ground with a tint, (84, 84, 3)."""
    small = 135 + rng.uniform(-25, 25) + rng.uniform(-14, 14, (3, 3, 3))
    image = Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image).astype(np.float64)


def _paint(
    canvas: NDArray[np.float64],
    mask: NDArray[np.float64],
    radius: float,
    colour: NDArray[np.float64],
    *,
    middle: tuple[int, int],
    light: float,
) -> None:
    """Paints a shape, shaded away from the light and with a soft shadow."""
    half = len(mask) // 2
    for away, strength in ((2, -45.0), (0, 0.0)):
        y, x = (round(m - away * f(light)) - half for m, f in zip(middle, (np.cos, np.sin), strict=True))
        rows, columns = slice(max(y, 0), y + len(mask)), slice(max(x, 0), x + len(mask))
        inside = mask[rows.start - y :, columns.start - x :][: SIDE - rows.start, : SIDE - columns.start, None]
        part = canvas[rows, columns]
        if away:
            part += inside * strength
        else:
            v, u = (
                np.mgrid[: part.shape[0], : part.shape[1]]
                + np.array([rows.start - y, columns.start - x])[:, None, None]
            )
            shade = 1 + 0.16 * ((v - half) * np.cos(light) + (u - half) * np.sin(light)) / radius
            part += inside * (shade[..., None] * colour - part)


def _mask(shape: str, radius: float, turn: float) -> NDArray[np.float64]:
    """How far each pixel is covered, an odd square that holds the shape."""
    half = int(np.ceil(radius * 1.25)) + 1
    side = 2 * half + 1
    image = Image.new("L", (side * SCALE, side * SCALE), 0)
    pen, centre = ImageDraw.Draw(image), side * SCALE / 2
    pen.polygon(
        [(centre + x * radius * SCALE, centre + y * radius * SCALE) for x, y in OUTLINES[shape](turn)], fill=255
    )
    if shape == "ring":
        hole = radius * SCALE * 0.55
        pen.ellipse((centre - hole, centre - hole, centre + hole, centre + hole), fill=0)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX)).astype(np.float64) / 255
