"""The model card beside each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
language: en
tags:
- lora
---

# {name}

{description} Sounds by flite, trained by `train.py` of this example, on the decoder alone.

| setting | value |
|---|---|
{settings}

| split | rows | exact match | log-likelihood of the answer |
|---|---|---|---|
{scores}

Stored in half precision, which the scores are of. The log-likelihood is in nats, the mean over rows, the end included.
"""


def write_card(
    folder: Path, base: str, description: str, settings: Mapping[str, Any], scores: Mapping[str, Any]
) -> None:
    """Writes the folder's README.md: the task, how the adapter was trained and what it scores."""
    kinds = (("validation", "own", ""), ("test", "own", ""), ("test", "no_adapter", ", without the adapter"))
    rows = [
        f"| {split}{which} | {scores[split]['rows']} | {found['exact_match']:.4f} | {found['log_likelihood']:.2f} |"
        for split, key, which in kinds
        for found in [scores[split][key]]
    ]
    text = CARD.format(
        base=base,
        name=folder.name,
        description=description,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        scores="\n".join(rows),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
