"""What turns inputs into tensors: a tokenizer, an image processor, or a processor that is both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coremerge.errors import SourceError
from coremerge.formats.source import local_path, parse_hub_id
from coremerge.learning.backbone import TOKEN_MASK
from coremerge.learning.optional import first_line, optional

MOST_TOKENS = 512
"""Of a text, unless more are asked for."""


def load_processor(base: str | Path) -> Any:
    """What turns a base model's inputs into tensors: a processor, a tokenizer or an image processor.

    Args:
        base: a folder or a hub id. Code in it is not run.

    Raises:
        MissingExtraError: transformers is not installed.
        SourceError: there is none that can be loaded.
    """
    transformers = optional("transformers")
    place, where = base_place(base)
    kinds = (transformers.AutoProcessor, transformers.AutoTokenizer, transformers.AutoImageProcessor)
    problems: list[str] = []
    for kind in kinds:
        processor = _loaded(partial(kind.from_pretrained, place, **where), problems)
        if processor is not None:
            return processor
    raise SourceError(
        f"neither a tokenizer nor an image processor can be loaded: {problems[0]}", file=base,
        remedy="Save them into the model's folder, beside its config.json",
    )  # fmt: skip


def base_place(base: str | Path) -> tuple[str, dict[str, str | None]]:
    """What ``from_pretrained`` is to be given for a folder or a hub id: the place, and keywords.

    Raises:
        SourceError: it is neither.
    """
    if path := local_path(base):
        return str(path if "://" in str(base) else base), {}
    hub = parse_hub_id(str(base))
    if hub is None:
        raise SourceError("no such base model", file=base, remedy="Give its folder or its hub id")
    return hub.repo, {"revision": hub.revision, "subfolder": hub.subfolder or ""}


def _loaded(load: Callable[..., Any], problems: list[str]) -> Any:
    try:
        processor = load(trust_remote_code=False)
        _check(parts_of(processor))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        problems.append(first_line(error))
        return None
    return processor


@dataclass(frozen=True)
class Parts:
    """A processor and what it consists of, where it has that."""

    whole: Any
    tokenizer: Any
    pictures: Any

    @property
    def image_token(self) -> str | None:
        """What stands for an image in a text, if images go there."""
        token = getattr(self.whole, "image_token", None) if self.pictures is not None else None
        return None if token is None else str(token)


def parts_of(processor: Any) -> Parts:
    if isinstance(processor, optional("transformers").PreTrainedTokenizerBase):
        return Parts(processor, processor, None)
    if hasattr(processor, "preprocess"):
        return Parts(processor, None, processor)
    return Parts(processor, getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None))


def _check(parts: Parts) -> None:
    if parts.tokenizer is None and parts.pictures is None:
        raise ValueError(f"{type(parts.whole).__name__} takes neither texts nor images")
    if parts.tokenizer is not None and len(parts.tokenizer) <= len(_special(parts.tokenizer)) + 1:
        raise ValueError("there are no files of a tokenizer")  # transformers then makes one up that knows no word


def usual_length(tokenizer: Any) -> int:
    return int(min(getattr(tokenizer, "model_max_length", None) or MOST_TOKENS, MOST_TOKENS))


@contextmanager
def padding(tokenizer: Any) -> Iterator[None]:
    """Padded on the right, whatever the tokenizer is set to: positions then count from a text's beginning."""
    if tokenizer is None:
        yield
        return
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "right"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None


def adds_special(texts: Sequence[str], parts: Parts) -> bool:
    """Templates of tokenizers hold all special tokens; those of processors not always the first."""
    begin = parts.tokenizer.bos_token if parts.tokenizer is not None else None
    return parts.whole is not parts.tokenizer and not (begin and all(text.startswith(begin) for text in texts))


def with_mask(batch: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    ids = batch["input_ids"]
    counts = batch["attention_mask"].bool() & ~torch.isin(
        ids, torch.tensor(sorted(_no_content(parts)), dtype=ids.dtype)
    )
    return {**batch, TOKEN_MASK: counts.to(batch["attention_mask"].dtype)}


def _no_content(parts: Parts) -> set[int]:
    found = _special(parts.tokenizer)
    if parts.image_token is not None:
        known = getattr(parts.whole, "image_token_id", None)
        found.add(parts.tokenizer.convert_tokens_to_ids(parts.image_token) if known is None else known)
    return found


def _special(tokenizer: Any) -> set[int]:
    """More than ``get_special_tokens_mask`` knows: chat markers are often special without a name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
