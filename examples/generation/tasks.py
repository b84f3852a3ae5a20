"""Makes every task's rows, the same every time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import sentences
import words
from lexicon import Lexicon
from splits import Fields, Splits

OF_WORDS = (
    words.past_tense,
    words.category,
    words.is_a,
    words.gloss,
    words.part_of_speech,
    words.chain,
    words.verb_topic,
    words.word_fits_gloss,
    words.alive,
)
OF_SENTENCES = (sentences.slots, sentences.to_json, sentences.iso_date, sentences.number_words)


def make(wordnet: Path) -> dict[str, Splits]:
    """All tasks by name, each with its splits."""
    lexicon = Lexicon(wordnet)
    made = {maker.__name__: maker(lexicon, random.Random(maker.__name__)) for maker in OF_WORDS}
    return made | {maker.__name__: maker(random.Random(maker.__name__)) for maker in OF_SENTENCES}


def write(folder: Path, name: str, splits: Splits, unlabelled: Callable[[Fields], Mapping[str, object]]) -> None:
    """Writes the rows of all splits but the training one, a JSON object a line.

    ``unlabelled`` turns a row into the prompt as it stands, which is all that is kept of the split of that name.
    """
    folder.mkdir(exist_ok=True)
    rows: dict[str, list[Mapping[str, object]]] = {split: list(splits[split]) for split in ("validation", "test")}
    rows["unlabelled"] = [unlabelled(fields) for fields in splits["unlabelled"]]
    for split, each in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
        (folder / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
