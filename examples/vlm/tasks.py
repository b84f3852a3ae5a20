"""The tasks: what is asked about a picture, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from emoji import Emoji, paint, read_emoji, without_most_flags
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scenes import NUMBERS, PLACES, Scene, make_scene

SPLITS = {"unlabelled": 64, "validation": 100, "test": 200}
"""Rows that ship."""

QUALITY = 80
TASKS = {
    "emoji_name": "The name of an emoji, from its 3-D render.",
    "emoji_kind": "Of which of fourteen kinds an emoji is.",
    "scene_caption": "What is where in a scene of two to six coloured shapes.",
    "colour": "The colour of a shape in a scene.",
    "shape": "Which shape of a scene has a colour.",
    "position": "Where in a scene a coloured shape is.",
    "count": "How many shapes there are in a scene, or of one sort.",
    "relation": "Whether one shape of a scene is left of, right of, above or below another one.",
}
Turn = tuple[str, str]
"""A question, and its answer."""


@dataclass(frozen=True)
class Item:
    """A picture, and all that is asked about it.

    Attributes:
        webp: the picture's file.
        turns: task → its questions, in a random order; the first one ships.
        cells: what is in each cell of a grid of three by three, row by row, in words.
    """

    webp: bytes
    turns: dict[str, list[Turn]] = field(repr=False)
    cells: tuple[str, ...]

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
    return {split: [_scene_item(make_scene(rngs[split]), rngs[split]) for _ in range(n)] for split, n in counts.items()}


def _emoji_item(emoji: Emoji, rng: Generator) -> Item:
    turns = {
        "emoji_name": [("Name this emoji.", emoji.name)],
        "emoji_kind": [("What kind of thing is this?", emoji.kind)],
    }
    return Item(_webp(paint(emoji, rng)), turns, (emoji.name,) * 9)


def _scene_item(scene: Scene, rng: Generator) -> Item:
    found = {task: list(ask(scene, rng)) for task, ask in ASK.items()}
    turns = {task: [all_turns[i] for i in rng.permutation(len(all_turns))] for task, all_turns in found.items()}
    things = {thing.place: f"{thing.name} {PLACES[thing.place]}" for thing in scene.things}
    return Item(_webp(scene.picture), turns, tuple(things.get(place, "grey") for place in range(9)))


def _webp(picture: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def _caption(scene: Scene, rng: Generator) -> Iterator[Turn]:
    yield "Describe this picture.", scene.caption()


def _colour(scene: Scene, rng: Generator) -> Iterator[Turn]:
    for thing in scene.alone(lambda thing: thing.shape):
        yield f"Which colour is the {thing.shape}?", thing.colour


def _shape(scene: Scene, rng: Generator) -> Iterator[Turn]:
    for thing in scene.alone(lambda thing: thing.colour):
        yield f"Which shape is {thing.colour}?", thing.shape


def _position(scene: Scene, rng: Generator) -> Iterator[Turn]:
    for thing in scene.alone(lambda thing: thing.name):
        yield f"Where is the {thing.name}?", PLACES[thing.place]


def _count(scene: Scene, rng: Generator) -> Iterator[Turn]:
    """All, or those of the commonest shape where it is there more than once."""
    shapes = [thing.shape for thing in scene.things]
    commonest = max(sorted(set(shapes)), key=shapes.count)
    if shapes.count(commonest) > 1:
        yield (
            f"How many {commonest}{'es' if commonest == 'cross' else 's'} are there?",
            NUMBERS[shapes.count(commonest)],
        )
    else:
        yield "How many shapes are there?", NUMBERS[len(shapes)]


def _relation(scene: Scene, rng: Generator) -> Iterator[Turn]:
    """Two things that differ along one axis at least; as many are asked of with yes as with no for an answer."""
    things = scene.alone(lambda thing: thing.name)
    first, second = (things[i] for i in rng.permutation(len(things))[:2])
    (y, x), (v, u) = divmod(first.place, 3), divmod(second.place, 3)
    said = [words for words, differ in ((("left of", "right of"), x - u), (("above", "below"), y - v)) if differ]
    signs = {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}
    words = said[int(rng.integers(len(said)))][int(rng.integers(2))]
    yield f"Is the {first.name} {words} the {second.name}?", "yes" if signs[words] else "no"


ASK: dict[str, Callable[[Scene, Generator], Iterator[Turn]]] = {
    "scene_caption": _caption,
    "colour": _colour,
    "shape": _shape,
    "position": _position,
    "count": _count,
    "relation": _relation,
}
