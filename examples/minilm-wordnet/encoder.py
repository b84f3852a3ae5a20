"""The base model of this example: sentences to mean-pooled features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Rows:
    """Tokenised texts, not padded yet."""

    tokens: list[dict[str, list[int]]]

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.tokens]


class Encoder:
    """The base model and its tokenizer, from a folder or a hub id."""

    def __init__(self, source: str, max_length: int) -> None:
        self.source, self.max_length = source, max_length
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.width: int = AutoConfig.from_pretrained(source).hidden_size

    def fresh(self) -> PreTrainedModel:
        """The base model without any adapter; its dropout is off, as two epochs on small adapters need none."""
        model: PreTrainedModel = AutoModel.from_pretrained(
            self.source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return model

    def rows(self, texts: list[tuple[str, str | None]]) -> Rows:
        return Rows([self.tokenizer(a, b, truncation=True, max_length=self.max_length).data for a, b in texts])

    def features(self, model: nn.Module, rows: Rows, chosen: list[int]) -> Tensor:
        """Mean over the tokens of the last layer, one row a text."""
        batch = self.tokenizer.pad([rows.tokens[i] for i in chosen], return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled: Tensor = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return pooled

    @torch.no_grad()
    def all_features(self, model: nn.Module, rows: Rows) -> Tensor:
        """The features of every row, in the rows' order."""
        model.eval()
        order = sorted(range(len(rows.tokens)), key=rows.lengths.__getitem__)
        parts = [self.features(model, rows, order[i : i + 128]) for i in range(0, len(order), 128)]
        return torch.cat(parts)[torch.tensor(order).argsort()]
