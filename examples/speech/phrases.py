"""What is said, and what each of the two tasks answers: the fields of an order, or a time of day in digits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SIZES = {"train": 320, "unlabelled": 24, "validation": 24, "test": 48}

VERBS = ("send", "bring", "carry", "ship")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
THINGS = ("lamps", "chairs", "boxes", "coats", "plates", "books", "shoes", "doors", "clocks", "pens")
CITIES = ("Oslo", "Rome", "Paris", "Cairo", "Lima", "Boston", "Tokyo", "Dublin", "Madrid", "Vienna")

OPENINGS = ("wake me at", "call me at", "meet me at", "we leave at", "the train is at")
HOURS = ("one", *NUMBERS, "ten", "eleven")
MINUTES = {
    "": 0, "five past": 5, "ten past": 10, "a quarter past": 15, "twenty past": 20, "half past": 30,
    "twenty to": -20, "a quarter to": -15, "ten to": -10, "five to": -5,
}  # fmt: skip
EVENING = 6

VOICES = ("kal16", "awb", "rms", "slt")


@dataclass(frozen=True)
class Phrase:
    """What is said, what is to be answered, and how it is said.

    Attributes:
        text: for the voice.
        answer: for the model.
        voice: one of flite's.
        pitch: of the voice, over its usual one.
        stretch: of its sounds; below 1 is faster.
    """

    text: str
    answer: str
    voice: str
    pitch: float
    stretch: float


def order(rng: random.Random) -> tuple[str, str]:
    """An order's words, and its five fields between bars."""
    verb, number, colour, thing, city = (rng.choice(each) for each in (VERBS, NUMBERS, COLOURS, THINGS, CITIES))
    text = f"{verb.capitalize()} {number} {colour} {thing} to {city}."
    return text, f"{verb} | {NUMBERS.index(number) + 2} | {colour} | {thing} | {city}"


def clock(rng: random.Random) -> tuple[str, str]:
    """A sentence with a time of day in words, and that time in digits."""
    opening, hour, late = rng.choice(OPENINGS), rng.randrange(1, 12), rng.choice((False, True))
    words, minutes = rng.choice(list(MINUTES.items()))
    part = ("evening" if hour >= EVENING else "afternoon") if late else "morning"
    said = f"{words} {HOURS[hour - 1]} in the {part}".strip()
    hours, rest = divmod(hour * 60 + minutes, 60)
    return f"{opening.capitalize()} {said}.", f"{hours or 12}:{rest:02} {'pm' if late else 'am'}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"order": order, "clock": clock}


def draw(task: str) -> dict[str, list[Phrase]]:
    """Each split's phrases, the same every time; no text is in two of them."""
    rng = random.Random(task)
    found: dict[str, Phrase] = {}
    while len(found) < sum(SIZES.values()):
        text, answer = TASKS[task](rng)
        how = rng.choice(VOICES), round(rng.uniform(0.85, 1.2), 2), round(rng.uniform(0.75, 0.95), 2)
        found.setdefault(text, Phrase(text, answer, *how))
    phrases = iter(found.values())
    return {split: [next(phrases) for _ in range(size)] for split, size in SIZES.items()}
