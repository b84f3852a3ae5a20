"""The model card beside each adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """\
---
base_model: {base}
library_name: peft
license: other
license_name: wordnet-3.0
license_link: ../../LICENSE-WORDNET
language: en
tags:
- {kind}
- wordnet
---

# {name}

{description} Cut from WordNet 3.0 by `tasks.py`, trained by `train.py` of this example.

| setting | value |
|---|---|
{settings}

`head.safetensors` holds the linear head (`weight`, `bias`) on the mean of the last layer's tokens.
Everything is stored in half precision; the scores below are of the stored files.

| split | rows | {metric}, with this adapter | {metric}, the base model under the same head |
|---|---|---|---|
{scores}

```python
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "adapters/{name}")
```
"""


def write_card(folder: Path, base: str, description: str, settings: dict[str, Any], scores: dict[str, Any]) -> None:
    """Writes the folder's README.md: the task, how the adapter was trained and what it scores."""
    text = CARD.format(
        base=base,
        name=folder.name,
        description=description,
        kind=settings["type"].lower(),
        metric={"accuracy": "accuracy", "pearson": "Pearson's r"}[scores["metric"]],
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        scores="\n".join(
            f"| {split} | {scores[split]['rows']:,} | {scores[split]['own']:.4f} | {scores[split]['no_adapter']:.4f} |"
            for split in ("validation", "test")
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
