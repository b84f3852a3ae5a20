"""The model card beside each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """\
---
base_model: {base}
library_name: peft
{licence}
language: en
tags:
- lora
---

# {name}

{description} Rows made by `tasks.py`, trained by `train.py` of this example.

| setting | value |
|---|---|
{settings}

Everything is stored in half precision; the scores below are of the stored files, in bfloat16.

| split | rows | {metric} | log-likelihood of the answer |
|---|---|---|---|
{scores}

The log-likelihood is in nats, the mean over rows, the token that ends the answer included. The updates have a mean
Frobenius norm of {norm:.2f}. On the adapter's own prompts, while it is active, its down-projections miss a share of
{own:.4f} of their inputs (the null-space ratio); random rows of that rank would miss {random:.4f}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "adapters/{name}")
```
"""

WORDNET = "license: other\nlicense_name: wordnet-3.0\nlicense_link: ../../LICENSE-WORDNET"
METRICS = {"exact_match": "exact match", "accuracy": "accuracy", "chrf": "chrF", "rouge_l": "ROUGE-L"}
OURS = ("slots", "to_json", "iso_date", "number_words")
"""Tasks from sentences of our own; the others have WordNet's words and glosses."""


def write_card(
    folder: Path, base: str, description: str, settings: Mapping[str, Any], scores: Mapping[str, Any]
) -> None:
    """Writes the folder's README.md: the task, how the adapter was trained and what it scores."""
    ours = folder.name in OURS
    text = CARD.format(
        base=base,
        name=folder.name,
        description=description,
        licence="license: apache-2.0" if ours else WORDNET,
        metric=METRICS[scores["metric"]],
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        scores="\n".join(_rows(scores)),
        norm=scores["mean_frobenius_norm"],
        **scores["null_space_ratio"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rows(scores: Mapping[str, Any]) -> list[str]:
    kinds = (("validation", "own", ""), ("test", "own", ""), ("test", "no_adapter", ", without the adapter"))
    return [
        f"| {split}{which} | {scores[split]['rows']} | {found[scores['metric']]:.4f} | {found['log_likelihood']:.2f} |"
        for split, key, which in kinds
        for found in [scores.get(split, {}).get(key, {})]
        if scores["metric"] in found
    ]
