"""Tasks from sentences of our own: dates, numbers in words, and what a sentence says of a person."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator

from splits import Example, Splits, take

ROWS = 9000
"""Drawn for each task; those that come twice are dropped, and the splits take what they need."""


def listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = listed(
    "Ada Anna Ben Boris Clara Dario David Elena Emma Erik Farah Felix Grace Hana Henry Ines Ivan Iris Jack Julia Karen "
    "Kofi Lena Liam Lucas Maria Mina Nadia Noah Olga Omar Paul Petra Quinn Rosa Ruth Sam Sofia Tara Tina Victor Wendy"
)
CITIES = listed(
    "Accra Athens Berlin Bogota Boston Cairo Delhi Dublin Geneva Havana Kyoto Lagos Lima Lisbon London Madrid Manila "
    "Milan Nairobi Oslo Paris Prague Quito Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw"
)
JOBS = listed(
    "actor baker barber builder butcher carpenter chef clerk dancer dentist doctor driver editor farmer fisher "
    "gardener judge lawyer nurse painter pilot plumber poet singer soldier tailor teacher waiter welder writer"
)
PERSONS = (
    "{name}, {age}, is {a} {job} in {city}.",
    "In {city} lives {name}, {a} {job} of {age}.",
    "{A} {job} named {name} moved to {city} at {age}.",
    "{name} from {city} turned {age} and works as {a} {job}.",
    "At {age}, {name} became {a} {job} in {city}.",
    "{city} has a new {job}: {name}, aged {age}.",
)

MONTHS = listed("January February March April May June July August September October November December")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DATES = (
    "{month} {nth}, {year}",
    "{day} {short} {year}",
    "{weekday}, {short} {day}, {year}",
    "the {nth} of {month} {year}",
    "{day:02}.{number:02}.{year}",
    "{weekday} the {nth} of {month}, {year}",
)

UNITS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = listed("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


def slots(rng: random.Random) -> Splits:
    """Name, age, job and city, between bars."""
    return take(rng, (Example(text, {"text": text, "answer": " | ".join(said.values())}) for text, said in _people()))


def to_json(rng: random.Random) -> Splits:
    """The same of the same sentences, as a JSON object."""
    return take(rng, (Example(text, {"text": text, "answer": _object(said)}) for text, said in _people()))


def iso_date(rng: random.Random) -> Splits:
    """A date in words as year-month-day."""
    days = (datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(45000)) for _ in range(ROWS))
    written = ((_written(day, rng.choice(DATES)), day) for day in days)
    return take(rng, (Example(text, {"text": text, "answer": day.isoformat()}) for text, day in written))


def number_words(rng: random.Random) -> Splits:
    """A number of two to six digits in words."""
    numbers = [rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices(range(2, 7), k=ROWS)]
    return take(rng, (Example(f"{n:,}", {"text": f"{n:,}", "answer": in_words(n)}) for n in numbers))


def in_words(n: int) -> str:
    """A number below a million in English words: "two hundred and six thousand and forty-one"."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % size
    tail = (" and " if rest < 100 else " ") + in_words(rest) if rest else ""
    return f"{in_words(n // size)} {name}{tail}"


def _people() -> Iterator[tuple[str, dict[str, str]]]:
    """Sentences, the same for every task that reads them, and what each says."""
    rng = random.Random("people")
    for _ in range(ROWS):
        said = {"name": rng.choice(NAMES), "age": str(rng.randrange(18, 90)), "job": rng.choice(JOBS)}
        said["city"] = rng.choice(CITIES)
        article = "an" if said["job"][0] in "aeiou" else "a"
        yield rng.choice(PERSONS).format(a=article, A=article.capitalize(), **said), said


def _object(said: dict[str, str]) -> str:
    return json.dumps({**said, "age": int(said["age"])})


def _written(day: datetime.date, template: str) -> str:
    month = MONTHS[day.month - 1]
    return template.format(
        day=day.day,
        nth=_nth(day.day),
        number=day.month,
        month=month,
        short=month[:3],
        year=day.year,
        weekday=DAYS[day.weekday()],
    )


def _nth(n: int) -> str:
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
