"""Small scenes of spheres, boxes and cylinders on a floor, ray-cast with shadows and textures.

Arrays of vectors are (3, n), float32; y points up, the camera looks along z, downwards by its tilt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SHAPES = ("sphere", "box", "cylinder")
SURFACES = ("sky", "floor", *SHAPES)
FAR, NEAREST, SIZE, OVER = 40.0, 1e-3, 112, 2
FARTHEST = 15.0
"""Depth at which labels end."""


@dataclass(frozen=True)
class Solid:
    """One object; it stands on the floor.

    Attributes:
        kind: index into :data:`SHAPES`.
        place: its centre (3, 1).
        size: half its height.
        yaw: radians about the vertical.
        colours: two, (2, 3, 1).
        waves: of its texture, a unit of length.
    """

    kind: int
    place: Floats
    size: float
    yaw: float
    colours: Floats
    waves: float

    @property
    def turn(self) -> Floats:
        """The rotation into its own frame, (3, 3)."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)


@dataclass(frozen=True)
class Scene:
    """What a picture is of."""

    solids: list[Solid]
    tilt: float
    height: float
    azimuth: float
    elevation: float
    floor: tuple[int, float, Floats]
    """Pattern, its waves, and two colours (2, 3, 1)."""
    sky: Floats

    @property
    def light(self) -> Floats:
        """Towards the light, (3, 1)."""
        flat = np.cos(self.elevation)
        found = [np.sin(self.azimuth) * flat, np.sin(self.elevation), -np.cos(self.azimuth) * flat]
        return np.array(found, np.float32)[:, None]


@dataclass(frozen=True)
class View:
    """A picture and what is known of it.

    Attributes:
        image: (112, 112, 3), uint8.
        depth: distances (16, 16), logarithmic: 0 at 1, 1 at :data:`FARTHEST` and beyond.
        normals: (16, 16, 3) in the camera's frame: right, up, towards the camera; the sky's face the camera.
        surfaces: (16, 16), indices into :data:`SURFACES`, what covers most.
        shares: of the picture that each solid covers.
    """

    image: NDArray[np.uint8]
    depth: Floats
    normals: Floats
    surfaces: NDArray[np.uint8]
    shares: Floats


def draw_scene(random: np.random.Generator) -> Scene:
    """A scene at random."""

    def colours() -> Floats:
        return random.uniform(0.12, 1, (2, 3, 1)).astype(np.float32)

    def solid() -> Solid:
        size, depth = random.uniform(0.3, 0.85), random.uniform(2.2, 6.5)
        place = np.array([random.uniform(-0.55, 0.55) * depth, size, depth], np.float32)[:, None]
        kind, yaw = int(random.integers(3)), random.uniform(0, np.pi)
        return Solid(kind, place, size, yaw, colours(), random.uniform(1.5, 8))

    return Scene(
        solids=[solid() for _ in range(int(random.integers(1, 7)))],
        tilt=random.uniform(0.1, 0.65),
        height=random.uniform(1.2, 2.2),
        azimuth=random.uniform(-1.3, 1.3),
        elevation=random.uniform(0.5, 1.1),
        floor=(int(random.integers(3)), random.uniform(0.5, 2), colours()),
        sky=random.uniform(0.4, 1, (3, 1)).astype(np.float32),
    )


def look(scene: Scene, random: np.random.Generator) -> View:
    """The picture of a scene, with a little noise."""
    side = SIZE * OVER
    across = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * 0.7
    x, y = (grid.ravel() for grid in np.meshgrid(across, -across))
    rays = np.stack([x, y, np.ones_like(x)])
    rays /= np.sqrt((rays * rays).sum(0))
    c, s = np.float32(np.cos(scene.tilt)), np.float32(np.sin(scene.tilt))
    rays = np.stack([rays[0], rays[1] * c - rays[2] * s, rays[1] * s + rays[2] * c])
    start = np.array([0, scene.height, 0], np.float32)[:, None]

    distance, owner = _hit(scene, start, rays)
    points = start + rays * distance
    normals, albedo = _surface(scene, points, owner)
    normals[:, owner < 0] = -rays[:, owner < 0]
    blocked, _ = _hit(scene, points + normals * 2e-3, np.broadcast_to(scene.light, rays.shape), floor=False)
    lit = np.maximum((normals * scene.light).sum(0), 0) * (blocked >= FAR)
    colour = np.clip(albedo * (0.35 + 0.75 * lit), 0, 1) ** np.float32(1 / 1.6)
    fog = np.exp(-distance / 60)
    colour = np.where(owner < 0, scene.sky, colour * fog + scene.sky * (1 - fog))

    camera = np.stack([normals[0], normals[1] * c + normals[2] * s, normals[1] * s - normals[2] * c])
    camera[:, owner < 0] = np.array([0, 0, 1], np.float32)[:, None]
    return View(
        image=_picture(colour, random),
        depth=_blocks(np.log(np.clip(distance, 1, FARTHEST)) / np.float32(np.log(FARTHEST)), 16)[..., 0],
        normals=_unit(_blocks(camera, 16)),
        surfaces=_surfaces(scene, owner),
        shares=np.array([(owner == 1 + k).mean() for k in range(len(scene.solids))], np.float32),
    )


def _picture(colour: Floats, random: np.random.Generator) -> NDArray[np.uint8]:
    noise = random.normal(0, 2, (SIZE, SIZE, 3))
    return (_blocks(colour, SIZE) * 255 + noise).clip(0, 255).round().astype(np.uint8)


def _surfaces(scene: Scene, owner: NDArray[np.int8]) -> NDArray[np.uint8]:
    kinds = np.array([0, 1, *(2 + solid.kind for solid in scene.solids)])[owner + 1]
    shares = _blocks((kinds == np.arange(len(SURFACES))[:, None]).astype(np.float32), 16)
    return shares.argmax(-1).astype(np.uint8)


def _blocks(values: Floats, side: int) -> Floats:
    """(channels, n) or (n,) → (side, side, channels), averages of square blocks."""
    values = values.reshape(-1, side, SIZE * OVER // side, side, SIZE * OVER // side)
    return np.moveaxis(values.mean((2, 4)), 0, -1)


def _unit(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(-1, keepdims=True)), 1e-6)


def _hit(scene: Scene, start: Floats, rays: Floats, floor: bool = True) -> tuple[Floats, NDArray[np.int8]]:
    """Distances (n,), :data:`FAR` where there is nothing; and what is there: -1 nothing, 0 the floor, 1 + k solid k."""
    best = np.full(rays.shape[1], FAR, np.float32)
    owner = np.full(rays.shape[1], -1, np.int8)
    if floor:
        with np.errstate(divide="ignore", invalid="ignore"):
            down = -start[1] / rays[1]
        there = (rays[1] < 0) & (down < best)
        best[there], owner[there] = down[there], 0
    for k, solid in enumerate(scene.solids):
        found = _enter(solid.kind, solid.turn @ (start - solid.place) / solid.size, solid.turn @ rays / solid.size)
        there = (found > NEAREST) & (found < best)
        best[there], owner[there] = found[there], 1 + k
    return best, owner


def _enter(kind: int, p: Floats, d: Floats) -> Floats:
    """Where rays enter the solid of size 1 about the origin; infinity where they miss it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == SHAPES.index("sphere"):
            enter, leave = _round(p, d)
        else:
            first, second = (-1 - p) / d, (1 - p) / d
            low, high = np.minimum(first, second), np.maximum(first, second)
            if kind == SHAPES.index("cylinder"):
                near, far = _round(p[::2], d[::2])
                low, high = np.stack([near, low[1]]), np.stack([far, high[1]])
            enter, leave = low.max(0), high.min(0)
        return np.where(enter < leave, enter, np.float32(np.inf))


def _round(p: Floats, d: Floats) -> tuple[Floats, Floats]:
    a, b, c = (d * d).sum(0), (p * d).sum(0), (p * p).sum(0) - 1
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _surface(scene: Scene, points: Floats, owner: NDArray[np.int8]) -> tuple[Floats, Floats]:
    """Normals and albedo (3, n) each."""
    normals, albedo = np.zeros_like(points), np.zeros_like(points)
    on = owner == 0
    pattern, waves, colours = scene.floor
    x, z = points[0, on] * waves, points[2, on] * waves
    odd = ((np.floor(x) + np.floor(z)) % 2 > 0, np.floor(x) % 2 > 0, np.zeros(len(x), bool))[pattern]
    normals[1, on], albedo[:, on] = 1, np.where(odd, colours[0], colours[1])
    for k, solid in enumerate(scene.solids):
        on = owner == 1 + k
        local = solid.turn @ (points[:, on] - solid.place) / solid.size
        normals[:, on] = solid.turn.T @ _local_normals(solid.kind, local)
        odd = np.sin(local * solid.waves + np.array([[0], [1], [2]], np.float32)).prod(0) > 0
        albedo[:, on] = np.where(odd, solid.colours[0], solid.colours[1])
    return normals, albedo


def _local_normals(kind: int, p: Floats) -> Floats:
    if kind == SHAPES.index("sphere"):
        return p
    sides = np.abs(p)
    if kind == SHAPES.index("cylinder"):
        flat = np.sqrt(p[0] ** 2 + p[2] ** 2)
        top = sides[1] > flat
        return np.where(top, np.stack([0 * flat, np.sign(p[1]), 0 * flat]), np.stack([p[0], 0 * flat, p[2]]))
    return np.where(np.arange(3)[:, None] == sides.argmax(0), np.sign(p), np.float32(0))
