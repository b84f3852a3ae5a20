"""Small scenes: two to six coloured shapes on a grey ground, and what there is to say about them.

Everything follows from the random generator that is given: the same seed gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
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
class Thing:
    """One coloured shape.

    Attributes:
        place: index of its cell in :data:`PLACES`.
    """

    shape: str
    colour: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def where(self) -> str:
        place = PLACES[self.place]
        return f"in the {place}" if place == "middle" else f"at the {place}"


@dataclass(frozen=True)
class Scene:
    """Things in the order of their cells, and the picture (84, 84, 3) of bytes."""

    things: tuple[Thing, ...]
    picture: NDArray[np.uint8]

    def caption(self) -> str:
        """All of them, cell by cell: a red circle at the top left and a blue star in the middle."""
        parts = [f"{'an' if thing.colour[0] == 'o' else 'a'} {thing.name} {thing.where}" for thing in self.things]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

    def alone(self, key: Callable[[Thing], str]) -> list[Thing]:
        """The things that no other one shares ``key`` with."""
        counts = Counter(map(key, self.things))
        return [thing for thing in self.things if counts[key(thing)] == 1]


def make_scene(rng: Generator) -> Scene:
    """A scene with a thing whose shape and colour no other one has, and a second one that no other equals.

    Half of the scenes repeat one shape, so that there is something to count.
    """
    while True:
        scene = Scene(_things(rng), np.zeros((SIDE, SIDE, 3), np.uint8))
        if len(scene.alone(lambda thing: thing.name)) > 1:
            return Scene(scene.things, _draw(scene.things, rng))


def _things(rng: Generator) -> tuple[Thing, ...]:
    shapes, colours = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLOURS)).tolist()
    if rng.random() < 0.5:
        chosen = [shapes[1]] + [shapes[0]] * int(rng.integers(2, 6))
    else:
        chosen = shapes[: int(rng.integers(2, 5))]
    others = [colours[0], *(colours[1 + int(i)] for i in rng.integers(0, 5, len(chosen) - 1))]  # the first one once
    places = rng.permutation(9)[: len(chosen)].tolist()
    things = (Thing(shape, colour, place) for shape, colour, place in zip(chosen, others, places, strict=True))
    return tuple(sorted(things, key=lambda thing: thing.place))


def _draw(things: tuple[Thing, ...], rng: Generator) -> NDArray[np.uint8]:
    canvas = _ground(rng)
    light = rng.uniform(0, 2 * np.pi)
    for thing in things:
        _paint(canvas, thing, rng, light)
    return (canvas + rng.normal(0, 3, canvas.shape)).clip(0, 255).round().astype(np.uint8)


def _ground(rng: Generator) -> NDArray[np.float64]:
    """A smooth grey ground with a tint, (84, 84, 3)."""
    small = 135 + rng.uniform(-25, 25) + rng.uniform(-14, 14, (3, 3, 3))
    image = Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image).astype(np.float64)


def _paint(canvas: NDArray[np.float64], thing: Thing, rng: Generator, light: float) -> None:
    """Paints a thing, shaded away from the light and with a soft shadow, within its cell."""
    radius = rng.uniform(8.5, 11.5)
    mask = _mask(thing.shape, radius, rng.uniform(-0.3, 0.3))
    half = len(mask) // 2
    middle = [14 + 28 * part + int(rng.integers(-3, 4)) for part in divmod(thing.place, 3)]
    for away, strength in ((2, -45.0), (0, 0.0)):
        y, x = (int(round(m - away * f(light))) - half for m, f in zip(middle, (np.cos, np.sin), strict=True))
        rows, columns = slice(max(y, 0), y + len(mask)), slice(max(x, 0), x + len(mask))
        inside = mask[rows.start - y :, columns.start - x :][: SIDE - rows.start, : SIDE - columns.start]
        part = canvas[rows, columns]
        if away:
            part += inside[..., None] * strength
        else:
            v, u = np.mgrid[
                rows.start - y : rows.start - y + len(part), columns.start - x : columns.start - x + part.shape[1]
            ]
            shade = 1 + 0.16 * ((v - half) * np.cos(light) + (u - half) * np.sin(light)) / radius
            colour = np.array(COLOURS[thing.colour]) + rng.uniform(-12, 12, 3)
            part += inside[..., None] * (shade[..., None] * colour - part)


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
