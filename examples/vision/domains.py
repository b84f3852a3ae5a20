"""Seven domains: pictures of 112 pixels a side with all that is known of each, in splits from disjoint sources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from compositions import SIZE, compose, crowd, cut_out
from numpy.typing import NDArray
from packages import Packages
from PIL import Image
from raycaster import SHAPES, draw_scene, look

SPLITS = {"train": 0, "unlabelled": 1, "validation": 2, "test": 3}
COUNTS = {"unlabelled": 64, "validation": 100, "test": 300}
"""Of what ships."""
TRAINING = {
    "scenes": 5000,
    "compositions": 6000,
    "crowds": 5000,
    "emoji": 5000,
    "fashion": 6000,
    "animals": 6000,
    "textile": 2000,
}
"""Of each domain, to train on; of textile there are no more than 1,036."""
CATEGORIES = {
    "face": "Smileys & Emotion",
    "nature": "Animals & Nature",
    "food": "Food & Drink",
    "place": "Travel & Places",
    "activity": "Activities",
    "object": "Objects",
}
GROUPS = {**CATEGORIES, "body": "People & Body", "symbol": "Symbols", "flag": "Flags"}
DEFECTS = ("nominal", "local", "global")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
VISIBLE = 0.004
"""Share of the picture from which on a solid is counted."""

Record = Mapping[str, Any]
"""``image`` (112, 112, 3), uint8, and labels by name."""
Glyphs = Mapping[str, Sequence[Image.Image]]


class Domains:
    """Every domain's records, each made from its place alone, so that more of them change none of the first.

    Args:
        packages: where the pictures come from.
    """

    def __init__(self, packages: Packages) -> None:
        self.packages = packages
        self.makers: Mapping[str, Callable[[str, int], Iterator[Record]]] = {
            "scenes": self._scenes,
            "compositions": self._compositions,
            "crowds": self._crowds,
            "emoji": self._emoji,
            "fashion": self._fashion,
            "animals": self._animals,
            "textile": self._textile,
        }

    def records(self, domain: str, split: str, count: int) -> Iterator[Record]:
        """The first ``count`` records of a split; fewer where the source has no more."""
        return self.makers[domain](split, count)

    def _random(self, domain: str, split: str, place: int) -> np.random.Generator:
        return np.random.default_rng([list(self.makers).index(domain), SPLITS[split], place])

    @cached_property
    def _all_glyphs(self) -> Mapping[str, Sequence[tuple[str, Image.Image]]]:
        return {
            group: [(name, cut_out(picture)) for name, picture in found]
            for group, found in self.packages.emoji().items()
        }

    def _glyphs(self, split: str) -> Glyphs:
        """Group → the cut-outs of a split; unlabelled pictures are made of the training split's."""
        wanted = "train" if split == "unlabelled" else split
        return {
            group: [picture for name, picture in self._all_glyphs[listed] if _split_of(name) == wanted]
            for group, listed in GROUPS.items()
        }

    def _scenes(self, split: str, count: int) -> Iterator[Record]:
        for place in range(count):
            random = self._random("scenes", split, place)
            view = None
            while view is None or view.shares.max() < 5 * VISIBLE:
                scene = draw_scene(random)
                view = look(scene, random)
            yield {
                "image": view.image,
                "depth": view.depth,
                "normals": view.normals,
                "surfaces": view.surfaces,
                "light": scene.azimuth,
                "tilt": scene.tilt,
                "main_shape": SHAPES[scene.solids[int(view.shares.argmax())].kind],
                "shape_count": int((view.shares > VISIBLE).sum()),
            }

    def _compositions(self, split: str, count: int) -> Iterator[Record]:
        glyphs = self._glyphs(split)
        for place in range(count):
            random = self._random("compositions", split, place)
            category = list(CATEGORIES)[int(random.integers(len(CATEGORIES)))]
            made = compose(random, _pick(random, glyphs[category]))
            x, y = made.centre
            yield {
                "image": made.image,
                "category": category,
                "quadrant": QUADRANTS[int(x > 0.5) + 2 * int(y > 0.5)],
                "position": [x, y],
                "size": made.size,
                "rotation": [float(np.sin(made.turn)), float(np.cos(made.turn))],
                "mask": made.mask,
                "edges": made.edges,
            }

    def _crowds(self, split: str, count: int) -> Iterator[Record]:
        pictures = [picture for group in self._glyphs(split).values() for picture in group]
        for place in range(count):
            random = self._random("crowds", split, place)
            image, number, kinds = crowd(random, [_pick(random, pictures) for _ in range(3)])
            yield {"image": image, "count": number, "kinds": str(kinds)}

    def _emoji(self, split: str, count: int) -> Iterator[Record]:
        rows = [(group, picture) for group, found in self._glyphs(split).items() for picture in found]
        if split != "train":  # every picture once
            rows = [rows[i] for i in self._random("emoji", split, 0).permutation(len(rows))]
        for place in range(count if split == "train" else min(count, len(rows))):
            random = self._random("emoji", split, 1 + place)
            group, picture = _pick(random, rows) if split == "train" else rows[place]
            yield {"image": _alone(random, picture), "group": group}

    def _fashion(self, split: str, count: int) -> Iterator[Record]:
        images, labels = self.packages.fashion("t10k" if split == "test" else "train")
        return self._of_small("fashion", images, labels, _part(len(images), split, count))

    def _animals(self, split: str, count: int) -> Iterator[Record]:
        images, labels = self.packages.animals()
        return self._of_small("animal", images, labels, _part(len(images), split, count))

    def _of_small(
        self, key: str, images: NDArray[np.uint8], labels: Sequence[str], places: Iterable[int]
    ) -> Iterator[Record]:
        """Grey pictures, dark on white."""
        for i in places:
            picture = Image.fromarray(255 - images[i]).convert("RGB")
            yield {"image": np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)), key: labels[i]}

    def _textile(self, split: str, count: int) -> Iterator[Record]:
        rows = [(kind, picture) for kind in DEFECTS for picture in self._cloth[kind]]
        for i in _part(len(rows), split, count):
            kind, picture = rows[i]
            small = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGB")
            yield {"image": np.asarray(small), "defect": kind}

    @cached_property
    def _cloth(self) -> Mapping[str, Sequence[Image.Image]]:
        """As many without defects as with one of a kind."""
        return {kind: list(self.packages.textile(kind))[:500] for kind in DEFECTS}


def _split_of(name: str) -> str:
    """The split of an emoji, from a hash of its code points: of ten six are for training, one for validation."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.6 else "validation" if share < 0.72 else "test"


def _part(total: int, split: str, count: int) -> NDArray[np.int64]:
    """A split's places in one random order of all: those that ship come first."""
    begins = {"validation": 0, "unlabelled": 100, "test": 164, "train": sum(COUNTS.values())}
    return np.random.default_rng(5).permutation(total)[begins[split] :][:count]


def _pick(random: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(random.integers(len(options)))]


def _alone(random: np.random.Generator, picture: Image.Image) -> NDArray[np.uint8]:
    """A picture on one colour, a little moved and scaled."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in random.integers(150, 256, 3)))
    side = max(picture.size)
    scale = random.uniform(0.7, 0.95) * SIZE / side
    small = picture.resize(
        (max(4, round(picture.width * scale)), max(4, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    room = (SIZE - small.width, SIZE - small.height)
    image.paste(small, tuple(int(space * random.uniform(0.2, 0.8)) for space in room), small)
    return np.asarray(image)
