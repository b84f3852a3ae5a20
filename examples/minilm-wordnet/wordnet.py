"""Reads the data files of WordNet 3.0 (Debian's package wordnet-base), see wndb(5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PARTS_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}

TOPICS = """
    adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
    noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
    noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity
    noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition
    verb.communication verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion
    verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl
""".split()  # noqa: SIM905
"""The lexicographer files, in the order of lexnames(5)."""

Key = tuple[str, str]
"""A synset's name: part of speech (n, v, a or r) and offset."""


@dataclass(frozen=True)
class Pointer:
    """A relation to another synset; `source` and `target` count words from 1, 0 means the whole synset."""

    symbol: str
    key: Key
    source: int
    target: int


@dataclass(frozen=True)
class Synset:
    key: Key
    topic: str
    words: tuple[str, ...]
    pointers: tuple[Pointer, ...]
    gloss: str
    frames: frozenset[int] = frozenset()

    @property
    def pos(self) -> str:
        return self.key[0]

    def follow(self, *symbols: str) -> list[Key]:
        """The synsets that the pointers with one of these symbols lead to, in the file's order."""
        return [pointer.key for pointer in self.pointers if pointer.symbol in symbols]


class WordNet:
    """All synsets by key, in the order of the files."""

    def __init__(self, folder: Path) -> None:
        self.synsets = {
            synset.key: synset for name, pos in PARTS_OF_SPEECH.items() for synset in _read(folder, name, pos)
        }
        self.senses = _count_senses(folder)
        self._parents: dict[Key, list[Synset]] = {}
        self._depths: dict[Key, int] = {}

    def of(self, *parts: str) -> list[Synset]:
        """The synsets of these parts of speech."""
        return [synset for synset in self.synsets.values() if synset.pos in parts]

    def parents(self, synset: Synset) -> list[Synset]:
        """What the synset is a kind of, or an instance of."""
        if synset.key not in self._parents:
            self._parents[synset.key] = [self.synsets[key] for key in synset.follow("@", "@i")]
        return self._parents[synset.key]

    def depth(self, synset: Synset) -> int:
        """Steps up to the nearest root along kind-of links."""
        if synset.key not in self._depths:
            above = [self.depth(parent) for parent in self.parents(synset)]
            self._depths[synset.key] = 1 + min(above) if above else 0
        return self._depths[synset.key]

    def ancestors(self, synset: Synset) -> set[Key]:
        """Every synset above this one."""
        found: set[Key] = set()
        todo = list(self.parents(synset))
        while todo:
            parent = todo.pop()
            if parent.key not in found:
                found.add(parent.key)
                todo.extend(self.parents(parent))
        return found


def _lines(path: Path) -> Iterator[str]:
    """The lines of a database file after its licence, which is indented by two spaces."""
    with path.open(encoding="latin-1") as file:
        yield from (line for line in file if not line.startswith("  "))


def _read(folder: Path, name: str, pos: str) -> Iterator[Synset]:
    for line in _lines(folder / f"data.{name}"):
        left, _, gloss = line.partition("|")
        fields = left.split()
        count = int(fields[3], 16)
        words = tuple(_plain(fields[4 + 2 * i]) for i in range(count))
        start = 5 + 2 * count
        end = start + 4 * int(fields[start - 1])
        pointers = tuple(_pointer(fields[i : i + 4]) for i in range(start, end, 4))
        frames = frozenset(map(int, fields[end + 2 :: 3]))  # a verb's: their count, then "+ frame word" of each
        definition = gloss.split('; "')[0].strip()
        yield Synset((pos, fields[0]), TOPICS[int(fields[1])], words, pointers, definition, frames)


def _plain(word: str) -> str:
    """`word` as written: spaces for underscores, no marker such as (p) for an adjective's position."""
    return word.partition("(")[0].replace("_", " ")


def _pointer(fields: list[str]) -> Pointer:
    symbol, offset, pos, ends = fields
    return Pointer(symbol, (pos, offset), int(ends[:2], 16), int(ends[2:], 16))


def _count_senses(folder: Path) -> dict[str, int]:
    """How many senses each lemma has, over all parts of speech."""
    senses: dict[str, int] = {}
    for name in PARTS_OF_SPEECH:
        for line in _lines(folder / f"index.{name}"):
            lemma, _, count, *_ = line.split()
            senses[_plain(lemma)] = senses.get(_plain(lemma), 0) + int(count)
    return senses
