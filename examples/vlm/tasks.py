"""The tasks: what is asked about a picture, and the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from emoji import Emoji, paint, read_emoji, without_most_flags
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scenes import PLACES, Scene, make_scene

SPLITS = {"unlabelled": 64, "validation": 100, "test": 200}
"""Rows that ship."""

QUALITY = 80
TASKS = {
    "emoji_name": "The name of an emoji, from its 3-D render.",
    "emoji_kind": "Of which of fourteen kinds an emoji is.",
    "scene_caption": "All there is in a scene of one to five equal shapes and a dot.",
    "colour": "The colour of a scene's shapes.",
    "shape": "The shape of a scene's shapes.",
    "size": "Whether a scene's shapes are small or large.",
    "count": "How many shapes there are in a scene.",
    "position": "Where in a scene the dot is.",
}
LOOK = "What do you see?"
Turn = tuple[str, str]
"""A question, and its answer."""

Words = tuple[str, str, str, str]


@dataclass(frozen=True)
class Item:
    """A picture, and all that is asked about it.

    Attributes:
        webp: the picture's file.
        turns: task → its question.
        caption: what the projector learns from, in other words than any task's.
        cells: what each of the four patches of a cell is to tell, cells and patches row by row.
    """

    webp: bytes
    turns: dict[str, Turn] = field(repr=False)
    caption: Turn = field(repr=False)
    cells: tuple[Words, ...]

    @property
    def picture(self) -> NDArray[np.uint8]:
        """Bytes of (84, 84, 3)."""
        with Image.open(BytesIO(self.webp)) as image:
            return np.asarray(image.convert("RGB")).copy()


def emoji_items(assets: Path, names: Path, paintings: int) -> dict[str, list[Item]]:
    """Split → items; no emoji is in two of them. Each of ``train`` is painted several times."""
    rng = np.random.default_rng(0)
    all_emoji = without_most_flags(read_emoji(assets, names), rng)
    order = [all_emoji[i] for i in rng.permutation(len(all_emoji))]
    found: dict[str, list[Item]] = {}
    for split, count in SPLITS.items():
        found[split] = [_emoji_item(emoji, rng) for emoji in order[:count]]
        order = order[count:]
    return found | {"train": [_emoji_item(emoji, rng) for _ in range(paintings) for emoji in order]}


def scene_items(training: int) -> dict[str, list[Item]]:
    """Split → items."""
    counts = {**SPLITS, "train": training}
    rngs = {split: np.random.default_rng([1, i]) for i, split in enumerate(counts)}
    return {split: [_scene_item(make_scene(rngs[split])) for _ in range(n)] for split, n in counts.items()}


def _emoji_item(emoji: Emoji, rng: Generator) -> Item:
    turns = {"emoji_name": ("Name this emoji.", emoji.name), "emoji_kind": ("What kind of thing is this?", emoji.kind)}
    caption = (LOOK, f"I see this: {emoji.name} ({emoji.kind}).")
    return Item(_webp(paint(emoji, rng)), turns, caption, ((emoji.name, emoji.kind) * 2,) * 9)


def _scene_item(scene: Scene) -> Item:
    are = "is the" if len(scene.cells) == 1 else "are the"
    turns = {
        "scene_caption": ("Describe this picture.", scene.caption()),
        "colour": (f"Which colour {are} {scene.noun}?", scene.colour),
        "shape": ("Which shape is in this picture?", scene.shape),
        "size": (f"How large {are} {scene.noun}?", scene.size),
        "count": (f"How many {scene.colour} shapes are there?", scene.number),
        "position": ("Where is the dot?", PLACES[scene.dot]),
    }
    caption = (LOOK, f"I see a dot ({PLACES[scene.dot]}) and {scene.number} {scene.size} {scene.colour} {scene.noun}.")
    return Item(_webp(scene.picture), turns, caption, tuple(_words(scene, place) for place in range(9)))


def _words(scene: Scene, place: int) -> Words:
    if place in scene.cells:
        return scene.colour, scene.shape, scene.size, scene.number
    row, column = divmod(place, 3)
    where = ("top", "middle", "bottom")[row], ("left", "middle", "right")[column]
    return where * 2 if place == scene.dot else ("grey",) * 4


def _webp(picture: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()
