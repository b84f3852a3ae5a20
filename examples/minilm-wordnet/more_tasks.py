"""Six more tasks, cut like the first eight: for a second set of adapters, which nothing was tuned on."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

from tasks import Example, Maker, Splits, about, by_split, glossed, take
from wordnet import Synset, WordNet

TAKES_AN_OBJECT = frozenset(range(8, 12))
"""Verb frames "Somebody ----s something" and their like."""


def proper(wordnet: WordNet, rng: random.Random) -> Splits:
    """A noun's gloss: of something that has a name of its own, or of a kind of things."""
    nouns = glossed(wordnet, "n")
    return take(rng, (about(noun, "name" if noun.follow("@i") else "kind") for noun in nouns), balanced=True)


def transitive(wordnet: WordNet, rng: random.Random) -> Splits:
    """A verb's gloss: whether the verb takes an object."""
    verbs = glossed(wordnet, "v")
    return take(rng, (about(verb, "yes" if verb.frames & TAKES_AN_OBJECT else "no") for verb in verbs), balanced=True)


def word_class(wordnet: WordNet, rng: random.Random) -> Splits:
    """A bare word and its part of speech, where it has but one."""
    names = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
    classes: dict[str, set[str]] = {}
    for synset in wordnet.of(*names):
        for word in filter(re.compile("[a-z]{3,}").fullmatch, synset.words):
            classes.setdefault(word, set()).add(names[synset.pos])
    examples = (Example(word, None, *found) for word, found in sorted(classes.items()) if len(found) == 1)
    return take(rng, examples, balanced=True)


def same_topic(wordnet: WordNet, rng: random.Random) -> Splits:
    """Two glosses of verbs: whether they are of one topic."""
    near, far = by_split(glossed(wordnet, "v"), lambda verb: verb.topic), by_split(glossed(wordnet, "v"))
    examples = []
    for verb in glossed(wordnet, "v"):
        other = near(verb, rng) if rng.random() < 0.5 else far(verb, rng)
        if other != verb:
            examples.append(Example(verb.gloss, other.gloss, "yes" if verb.topic == other.topic else "no"))
    return take(rng, examples, balanced=True)


def similarity(wordnet: WordNet, rng: random.Random) -> Splits:
    """Two glosses of nouns and how much of their ways from the root they share, from 0 to 1 (Wu and Palmer)."""
    near, far = by_split(glossed(wordnet, "n"), lambda noun: noun.topic), by_split(glossed(wordnet, "n"))
    examples = []
    for noun in glossed(wordnet, "n"):
        other = near(noun, rng) if rng.random() < 0.7 else far(noun, rng)
        shared = ({noun.key} | wordnet.ancestors(noun)) & ({other.key} | wordnet.ancestors(other))
        way = max((1 + wordnet.depth(wordnet.synsets[key]) for key in shared), default=0)
        whole = 2 + wordnet.depth(noun) + wordnet.depth(other)
        if other != noun:
            examples.append(Example(noun.gloss, other.gloss, round(min(2 * way / whole, 1.0), 4)))
    return take(rng, examples)


def breadth(wordnet: WordNet, rng: random.Random) -> Splits:
    """A noun's gloss and the logarithm of the number of nouns below it, from none to fifteen and more."""
    below = Counter(key for noun in wordnet.of("n") for key in wordnet.ancestors(noun))
    size_of = {noun.key: min(math.log2(1 + below[noun.key]), 4.0) for noun in glossed(wordnet, "n")}
    levels: dict[int, list[Synset]] = {}
    for key, size in size_of.items():
        levels.setdefault(round(size), []).append(wordnet.synsets[key])
    least = min(len(level) for level in levels.values())
    chosen = [noun for _, level in sorted(levels.items()) for noun in rng.sample(level, min(2 * least, len(level)))]
    return take(rng, (about(noun, round(size_of[noun.key], 4)) for noun in chosen))


TASKS: tuple[Maker, ...] = (
    proper,
    transitive,
    word_class,
    same_topic,
    similarity,
    breadth,
)
