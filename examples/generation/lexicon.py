"""WordNet as these tasks ask it: common words, short glosses, the line of what a thing is a kind of."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "minilm-wordnet"))  # that example's reader of the files
from wordnet import PARTS_OF_SPEECH, Key, Synset, WordNet

LONGEST_GLOSS = 60
"""Characters: a training step costs time in proportion to its tokens."""


class Lexicon(WordNet):
    """WordNet with how often its words are used."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._firsts = dict(_first_senses(folder))
        self._counts = _counts(folder)

    def common(self, pos: str, count: int) -> list[str]:
        """The most used words of a part of speech, most used first."""
        words = (word for word, its in self._firsts if its == pos)
        return sorted(words, key=lambda word: (-self._counts.get((word, pos), 0), word))[:count]

    def first(self, word: str, pos: str) -> Synset:
        """A word's most used sense."""
        return self.synsets[self._firsts[word, pos]]

    def glossed(self, *parts: str) -> Iterator[Synset]:
        """The synsets of these parts of speech whose gloss is short, a gloss that occurs twice once."""
        found = {synset.gloss: synset for synset in self.of(*parts) if short(synset)}
        return iter(found.values())

    def above(self, synset: Synset) -> list[Synset]:
        """The synsets above this one, along first parents, nearest first."""
        found = []
        while parents := self.parents(synset):
            synset = parents[0]
            found.append(synset)
        return found


def short(synset: Synset) -> bool:
    """Whether its gloss is of three words at least, and brief."""
    words = synset.gloss.split()
    return len(words) >= 3 and len(synset.gloss) <= LONGEST_GLOSS and ";" not in synset.gloss


def _first_senses(folder: Path) -> Iterator[tuple[tuple[str, str], Key]]:
    """(word, part of speech) → its most used synset, from the index files, which list senses in that order."""
    for name, pos in PARTS_OF_SPEECH.items():
        for line in (folder / f"index.{name}").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                fields = line.split()
                word, count = fields[0].replace("_", " "), int(fields[2])
                yield (word, pos), (pos, fields[-count])


def _counts(folder: Path) -> dict[tuple[str, str], int]:
    """How often a word was met as a part of speech in the texts that WordNet's makers tagged."""
    parts = dict(zip("12345", "nvara", strict=True))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        sense, _, count = line.split()
        word, _, rest = sense.partition("%")
        counts[word.replace("_", " "), parts[rest[0]]] += int(count)
    return counts
