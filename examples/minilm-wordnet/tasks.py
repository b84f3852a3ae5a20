"""Cuts eight tasks from WordNet, the same every time.

Nothing leaks between the splits, nor from one task's training into another's test: which split a gloss (or a
bare word) may be used in depends on a hash of its own text alone, and both halves of a pair come from one split.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from wordnet import Synset, WordNet

K = TypeVar("K")
V = TypeVar("V")

SIZES = {"train": 8000, "validation": 500, "test": 1500}
SHARES = {"train": 0.65, "validation": 0.12, "test": 0.23}


class Example(NamedTuple):
    text: str
    pair: str | None
    label: str | float


Splits = dict[str, list[Example]]


@functools.cache
def split_of(text: str) -> str:
    """The split that everything about this gloss or word belongs to."""
    place = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return "test"


Maker = Callable[[WordNet, random.Random], Splits]


def cut(wordnet: WordNet, tasks: Iterable[Maker]) -> dict[str, Splits]:
    """The tasks by name, each with its splits."""
    return {make.__name__: make(wordnet, random.Random(make.__name__)) for make in tasks}


def noun_topic(wordnet: WordNet, rng: random.Random) -> Splits:
    return take(rng, (about(synset, _topic(synset)) for synset in glossed(wordnet, "n")))


def verb_topic(wordnet: WordNet, rng: random.Random) -> Splits:
    return take(rng, (about(synset, _topic(synset)) for synset in glossed(wordnet, "v")))


def part_of_speech(wordnet: WordNet, rng: random.Random) -> Splits:
    names = {"n": "noun", "v": "verb", "a": "modifier", "r": "modifier"}
    return take(rng, (about(synset, names[synset.pos]) for synset in glossed(wordnet, *names)), balanced=True)


def depth(wordnet: WordNet, rng: random.Random) -> Splits:
    return take(rng, (about(synset, float(wordnet.depth(synset))) for synset in glossed(wordnet, "n")))


def word_fits_gloss(wordnet: WordNet, rng: random.Random) -> Splits:
    """A word and a gloss: its own, or that of another noun of the same topic."""
    groups = _groups(glossed(wordnet, "n"), lambda synset: (split_of(synset.gloss), synset.topic))
    examples = []
    for synset in glossed(wordnet, "n"):
        word, other = rng.choice(synset.words), rng.choice(groups[split_of(synset.gloss), synset.topic])
        fits = word in other.words or rng.random() < 0.5
        examples.append(Example(word, (synset if fits else other).gloss, "yes" if fits else "no"))
    return take(rng, examples, key=lambda example: example.pair or "", balanced=True)


def is_a(wordnet: WordNet, rng: random.Random) -> Splits:
    """Two glosses: a noun's and its parent's, or the parent's of another noun of the same topic."""
    links = [
        (child, parent)
        for child in glossed(wordnet, "n")
        for parent in wordnet.parents(child)[:1]
        if split_of(child.gloss) == split_of(parent.gloss)
    ]
    groups = _groups(links, lambda link: (split_of(link[0].gloss), link[0].topic))
    examples = []
    for child, parent in links:
        other = rng.choice(groups[split_of(child.gloss), child.topic])[1]
        true = other.key in wordnet.ancestors(child) or rng.random() < 0.5
        examples.append(Example(child.gloss, (parent if true else other).gloss, "yes" if true else "no"))
    return take(rng, examples, balanced=True)


def polysemy(wordnet: WordNet, rng: random.Random) -> Splits:
    """A bare word and the logarithm of the number of its senses, from one to eight and more."""
    words = {word: count for word, count in wordnet.senses.items() if re.fullmatch("[a-z]{3,}", word)}
    groups = _groups(sorted(words), lambda word: min(round(math.log2(words[word])), 3))
    size = min(len(group) for group in groups.values())
    chosen = [word for level in sorted(groups) for word in rng.sample(groups[level], min(2 * size, len(groups[level])))]
    return take(rng, (Example(word, None, round(math.log2(words[word]), 4)) for word in chosen))


def relation(wordnet: WordNet, rng: random.Random) -> Splits:
    """Two bare words: the first is a kind of, a part of, the opposite of, the same as the second, or none of these."""
    pairs = _related_words(wordnet)
    related = {(a, b) for name in pairs for a, b in pairs[name]} | {(b, a) for name in pairs for a, b in pairs[name]}
    by_split = _groups((pair for name in pairs for pair in pairs[name]), lambda pair: split_of(pair[1]))
    for a, _ in pairs["kind of"] + pairs["part of"]:
        b = rng.choice(by_split[split_of(a)])[1]
        if (a, b) not in related:
            pairs["unrelated"].append((a, b))
    examples = [Example(a, b, name) for name in pairs for a, b in pairs[name] if split_of(a) == split_of(b)]
    return take(rng, examples, balanced=True)


TASKS: tuple[Maker, ...] = (
    noun_topic,
    verb_topic,
    part_of_speech,
    depth,
    word_fits_gloss,
    is_a,
    polysemy,
    relation,
)


def _related_words(wordnet: WordNet) -> dict[str, list[tuple[str, str]]]:
    """Pairs of lower-case words by relation, each unordered pair once."""
    names = {"@": "kind of", "#p": "part of", "#m": "part of", "#s": "part of", "!": "opposite of"}
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen: set[frozenset[str]] = set()

    def add(name: str, first: str, second: str) -> None:
        pair = frozenset((first, second))
        if len(pair) == 2 and pair not in seen and all(re.fullmatch("[a-z][a-z -]+", word) for word in pair):
            seen.add(pair)
            pairs[name].append((first, second))

    for synset in wordnet.synsets.values():
        for pointer in synset.pointers:
            if pointer.symbol in names:
                first, second = max(pointer.source - 1, 0), max(pointer.target - 1, 0)
                add(names[pointer.symbol], synset.words[first], wordnet.synsets[pointer.key].words[second])
        for word in synset.words[1:]:
            add("same as", synset.words[0], word)
    return pairs


def glossed(wordnet: WordNet, *parts: str) -> list[Synset]:
    """The synsets with a gloss long enough to tell anything."""
    return [synset for synset in wordnet.of(*parts) if len(synset.gloss) > 15]


def _topic(synset: Synset) -> str:
    return synset.topic.partition(".")[2].lower()


def about(synset: Synset, label: str | float) -> Example:
    return Example(synset.gloss, None, label)


def by_split(
    synsets: Iterable[Synset], kind: Callable[[Synset], str] = lambda synset: ""
) -> Callable[[Synset, random.Random], Synset]:
    """A draw of another synset of the same split and kind."""
    groups = _groups(synsets, lambda synset: (split_of(synset.gloss), kind(synset)))
    return lambda synset, rng: rng.choice(groups[split_of(synset.gloss), kind(synset)])


def _groups(items: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def take(
    rng: random.Random,
    examples: Iterable[Example],
    key: Callable[[Example], str] = lambda example: example.text,
    balanced: bool = False,
) -> Splits:
    """Shuffles the examples and fills the splits, each text once; `balanced` limits every label to its equal share."""
    unique = list({(example.text, example.pair): example for example in examples}.values())
    rng.shuffle(unique)
    splits = _groups(unique, lambda example: split_of(key(example)))
    limit = len({example.label for example in unique}) if balanced else 1
    return {split: _fill(splits[split], size, math.ceil(size / limit)) for split, size in SIZES.items()}


def _fill(examples: list[Example], size: int, per_label: int) -> list[Example]:
    """The first `size` examples of which no label has more than `per_label`."""
    counts: dict[str | float, int] = defaultdict(int)
    chosen = []
    for example in examples:
        counts[example.label] += 1
        if counts[example.label] <= per_label:
            chosen.append(example)
    return chosen[:size]
