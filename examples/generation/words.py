"""Tasks from WordNet's nouns, verbs and glosses; past tenses are lemminflect's."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

from lexicon import Lexicon, short
from splits import Example, Splits, split_of, take

T = TypeVar("T")

CATEGORIES = {
    "noun.act": "act",
    "noun.animal": "animal",
    "noun.body": "body",
    "noun.communication": "message",
    "noun.food": "food",
    "noun.location": "place",
    "noun.person": "person",
    "noun.plant": "plant",
    "noun.state": "state",
    "noun.substance": "substance",
}
"""WordNet's topics of nouns that `category` chooses from, in one word each."""

LIVING = ("noun.animal", "noun.person", "noun.plant")
VERBS = {
    "verb.change": "change",
    "verb.cognition": "thought",
    "verb.communication": "speech",
    "verb.contact": "touch",
    "verb.creation": "making",
    "verb.emotion": "feeling",
    "verb.motion": "motion",
    "verb.possession": "possession",
}
"""And those of verbs that `verb_topic` chooses from."""


def past_tense(wordnet: Lexicon, rng: random.Random) -> Splits:
    """A verb's past tense."""
    import lemminflect

    verbs = [word for word in wordnet.common("v", 3600) if re.fullmatch("[a-z]{2,}", word)]
    forms = ((verb, lemminflect.getInflection(verb, "VBD", inflect_oov=False)) for verb in verbs)
    return take(rng, (Example(verb, {"text": verb, "answer": form[0]}) for verb, form in forms if form))


def gloss(wordnet: Lexicon, rng: random.Random) -> Splits:
    """What a noun means: the first sense's gloss."""
    nouns = ((word, wordnet.first(word, "n")) for word in wordnet.common("n", 12000) if word.isalpha())
    return take(rng, (Example(word, {"text": word, "answer": sense.gloss}) for word, sense in nouns if short(sense)))


def chain(wordnet: Lexicon, rng: random.Random) -> Splits:
    """What the noun behind a gloss is a kind of, three steps up, nearest first."""
    found = ((synset, wordnet.above(synset)) for synset in wordnet.glossed("n"))
    return take(
        rng,
        (
            Example(synset.gloss, {"text": synset.gloss, "answer": ", ".join(up.words[0] for up in chain[:3])})
            for synset, chain in found
            if len(chain) >= 5
        ),
    )


def category(wordnet: Lexicon, rng: random.Random) -> Splits:
    """The topic of a noun from its gloss."""
    nouns = (synset for synset in wordnet.glossed("n") if synset.topic in CATEGORIES)
    return take(rng, (Example(s.gloss, {"text": s.gloss, "label": CATEGORIES[s.topic]}) for s in nouns), balanced=True)


def part_of_speech(wordnet: Lexicon, rng: random.Random) -> Splits:
    """Whether a gloss is that of a noun, a verb or an adjective."""
    names = {"n": "noun", "v": "verb", "a": "adjective"}
    return take(
        rng,
        (Example(s.gloss, {"text": s.gloss, "label": names[s.pos]}) for s in wordnet.glossed(*names)),
        balanced=True,
    )


def verb_topic(wordnet: Lexicon, rng: random.Random) -> Splits:
    """The topic of a verb from its gloss."""
    verbs = (synset for synset in wordnet.glossed("v") if synset.topic in VERBS)
    return take(rng, (Example(s.gloss, {"text": s.gloss, "label": VERBS[s.topic]}) for s in verbs), balanced=True)


def is_a(wordnet: Lexicon, rng: random.Random) -> Splits:
    """Whether one noun is a kind of another: one of three steps above it, or above another noun."""
    found = [(synset, wordnet.above(synset)[:3]) for synset in wordnet.glossed("n") if synset.topic in CATEGORIES]
    links = [(child, rng.choice(above)) for child, above in found if above and child.words[0].islower()]
    groups = grouped(links, lambda link: split_of(link[0].words[0]))
    examples = []
    for child, parent in links:
        other = rng.choice(groups[split_of(child.words[0])])[1]
        true = other.key in wordnet.ancestors(child) or rng.random() < 0.5
        pair = {"text": child.words[0], "kind": (parent if true else other).words[0]}
        examples.append(Example(pair["text"], {**pair, "label": "yes" if true else "no"}))
    return take(rng, examples, balanced=True)


def word_fits_gloss(wordnet: Lexicon, rng: random.Random) -> Splits:
    """Whether a gloss is that of the word, or of another noun of the same topic."""
    nouns = [synset for synset in wordnet.glossed("n") if all(word.islower() for word in synset.words)]
    groups = grouped(nouns, lambda synset: (split_of(synset.gloss), synset.topic))
    examples = []
    for synset in nouns:
        word, other = rng.choice(synset.words), rng.choice(groups[split_of(synset.gloss), synset.topic])
        fits = word in other.words or rng.random() < 0.5
        text = (synset if fits else other).gloss
        examples.append(Example(text, {"word": word, "text": text, "label": "yes" if fits else "no"}))
    return take(rng, examples, balanced=True)


def alive(wordnet: Lexicon, rng: random.Random) -> Splits:
    """Whether a gloss is of something that lives: a plant, an animal or a person."""
    nouns = (synset for synset in wordnet.glossed("n") if synset.topic in CATEGORIES)
    labels = ((synset.gloss, "yes" if synset.topic in LIVING else "no") for synset in nouns)
    return take(rng, (Example(gloss, {"text": gloss, "label": label}) for gloss, label in labels), balanced=True)


def grouped(items: Iterable[T], key: Callable[[T], object]) -> dict[object, list[T]]:
    found: dict[object, list[T]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return found
