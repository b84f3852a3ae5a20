"""What turns inputs into tensors: a tokenizer, an image processor, a feature extractor, or a processor of several."""

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
        remedy="Save them into the model's folder, beside its config.json (for images preprocessor_config.json)",
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
    sounds: Any = None

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
    names = ("tokenizer", "image_processor", "feature_extractor")
    return Parts(processor, *(getattr(processor, name, None) for name in names))


def _check(parts: Parts) -> None:
    if parts.tokenizer is None and parts.pictures is None:
        raise ValueError(f"{type(parts.whole).__name__} takes neither texts nor images")
    if parts.tokenizer is not None and len(parts.tokenizer) <= len(special_tokens(parts.tokenizer)) + 1:
        raise ValueError("there are no files of a tokenizer")  # transformers then makes one up that knows no word


def usual_length(tokenizer: Any) -> int:
    return int(min(getattr(tokenizer, "model_max_length", None) or MOST_TOKENS, MOST_TOKENS))


@contextmanager
def padding(tokenizer: Any, cut: str = "right") -> Iterator[None]:
    """Padded on the right, whatever the tokenizer is set to: positions then count from a text's beginning.

    Args:
        tokenizer: if there is one.
        cut: the side on which a text that is too long is cut.
    """
    if tokenizer is None:
        yield
        return
    sides, pad = (tokenizer.padding_side, tokenizer.truncation_side), tokenizer.pad_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", cut
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = sides
        if pad is None:
            tokenizer.pad_token = None


def adds_special(texts: Sequence[str], parts: Parts) -> bool:
    """Templates of tokenizers hold all special tokens; those of processors not always the first."""
    begin = parts.tokenizer.bos_token if parts.tokenizer is not None else None
    return parts.whole is not parts.tokenizer and not (begin and all(text.startswith(begin) for text in texts))


def with_mask(
    batch: Mapping[str, Any], parts: Parts, deciding: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """``batch``, padded on the right, with a mask of the tokens that count.

    Special tokens and those of an image do not, unless an answer's first token is decided there.

    Args:
        batch: with ``input_ids`` and ``attention_mask`` (rows, tokens).
        parts: of the processor that made it.
        deciding: positions in each row before which an answer begins; None: its last.
    """
    ids, present = batch["input_ids"], batch["attention_mask"].bool()
    counts = present & ~torch.isin(ids, torch.tensor(sorted(_no_content(parts)), dtype=ids.dtype))
    for row, length in enumerate(present.sum(1).tolist()):
        counts[row, list((length - 1,) if deciding is None else deciding[row])] = True
    return {**batch, TOKEN_MASK: counts.to(batch["attention_mask"].dtype)}


def answer_beginning(tokenizer: Any) -> list[int]:
    """The tokens with which a decoder's every answer begins: of Whisper, those of language and task.

    They are those that the tokenizer puts before a text which is to be said, ``text_target``.
    """
    if tokenizer is None:
        return []
    empty, word = (list(tokenizer(text_target=text)["input_ids"]) for text in ("", "a"))
    same = next((at for at, pair in enumerate(zip(empty, word, strict=False)) if pair[0] != pair[1]), len(empty))
    return empty[:same]


def _no_content(parts: Parts) -> set[int]:
    found = special_tokens(parts.tokenizer)
    if parts.image_token is not None:
        known = getattr(parts.whole, "image_token_id", None)
        found.add(parts.tokenizer.convert_tokens_to_ids(parts.image_token) if known is None else known)
    return found


def special_tokens(tokenizer: Any) -> set[int]:
    """More than ``get_special_tokens_mask`` knows: chat markers are often special without a name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
