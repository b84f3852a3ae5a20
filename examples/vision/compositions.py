"""Cut-outs on generated backgrounds: one with its place, size and turn, or a crowd of small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 112
MAP = 16
Pixels = NDArray[np.uint8]


def background(random: np.random.Generator) -> Image.Image:
    """Smooth colours, stripes or checks, with shapes strewn over some of them, and grain."""
    kind = int(random.integers(3))
    image = (_smooth, _stripes, _smooth)[kind](random)
    if kind == 2:
        _strew(image, random)
    grain = random.normal(0, random.uniform(0, 8), (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).round().astype(np.uint8))


def _smooth(random: np.random.Generator) -> Image.Image:
    k = int(random.integers(2, 7))
    small = Image.fromarray(random.integers(0, 256, (k, k, 3)).astype(np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _stripes(random: np.random.Generator) -> Image.Image:
    angle, wave = random.uniform(0, np.pi), random.uniform(6, 40)
    y, x = np.mgrid[:SIZE, :SIZE]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    odd = np.floor(u / wave) % 2 > 0
    if random.random() < 0.5:
        odd ^= np.floor(v / wave) % 2 > 0
    first, second = random.integers(0, 256, (2, 3))
    return Image.fromarray(np.where(odd[..., None], first, second).astype(np.uint8))


def _strew(image: Image.Image, random: np.random.Generator) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(3, 12))):
        x, y = (int(v) for v in random.integers(-10, SIZE, 2))
        w, h = (int(v) for v in random.integers(6, 40, 2))
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)


def cut_out(picture: Image.Image) -> Image.Image:
    """Without its empty margin."""
    box = picture.getchannel("A").getbbox()
    return picture.crop(box) if box else picture


def paste(image: Image.Image, picture: Image.Image, size: float, centre: tuple[float, float], turn: float) -> Pixels:
    """Pastes a cut-out of ``size`` pixels (its longer side), turned by ``turn`` degrees; returns its opacity."""
    scale = size / max(picture.size)
    small = picture.resize(
        (max(4, round(picture.width * scale)), max(4, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    small = small.rotate(turn, expand=True, resample=Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    layer.paste(small, (round(centre[0] - small.width / 2), round(centre[1] - small.height / 2)))
    image.paste(layer, (0, 0), layer)
    return np.asarray(layer.getchannel("A"))


@dataclass(frozen=True)
class Composition:
    """One cut-out on a background.

    Attributes:
        image: (112, 112, 3), uint8.
        centre: x and y, as shares of the side.
        size: of its longer side, as a share of the picture's.
        turn: radians, anticlockwise.
        mask: (16, 16), whether most of a place is covered.
        edges: (16, 16), 0 to 1: how much outline is in a place.
    """

    image: Pixels
    centre: tuple[float, float]
    size: float
    turn: float
    mask: Pixels
    edges: NDArray[np.float32]


def compose(random: np.random.Generator, picture: Image.Image) -> Composition:
    """A cut-out on a background, at random."""
    image = background(random)
    size = random.uniform(0.28, 0.7)
    x, y = (float(v) for v in random.uniform(size / 2, 1 - size / 2, 2))
    degrees = random.uniform(-90, 90)
    opacity = paste(image, picture, size * SIZE, (x * SIZE, y * SIZE), degrees)
    solid = Image.fromarray((opacity > 127).astype(np.uint8) * 255)
    outline = np.asarray(solid, np.float32) - np.asarray(solid.filter(ImageFilter.MinFilter(3)), np.float32)
    return Composition(
        image=np.asarray(image),
        centre=(x, y),
        size=size,
        turn=float(np.radians(degrees)),
        mask=(_blocks(np.asarray(solid, np.float32)) > 127).astype(np.uint8),
        edges=(_blocks(outline) / 255 * 4).clip(0, 1),
    )


def _blocks(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.reshape(MAP, SIZE // MAP, MAP, SIZE // MAP).mean((1, 3))


def crowd(random: np.random.Generator, pictures: Sequence[Image.Image]) -> tuple[Pixels, int, int]:
    """Small cut-outs on a background, apart from each other; how many they are, and of how many kinds."""
    image = background(random)
    count = int(random.integers(1, 10))
    kinds = min(count, int(random.integers(1, len(pictures) + 1)))
    which = [*range(kinds), *(int(v) for v in random.integers(0, kinds, count - kinds))]
    cells = random.permutation(16)[:count]
    for k, cell in zip(which, cells, strict=True):
        x, y = (float(v) for v in np.array([cell % 4, cell // 4]) + random.uniform(0.38, 0.62, 2))
        paste(image, pictures[k], random.uniform(16, 27), (x * SIZE / 4, y * SIZE / 4), random.uniform(-25, 25))
    return np.asarray(image), count, kinds
