"""From inputs to batches, as a model of ``transformers`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from coremerge.errors import ConfigError, InputError, SourceError
from coremerge.learning.backbone import Batch
from coremerge.learning.chats import Chat, render
from coremerge.learning.optional import first_line, optional
from coremerge.learning.processor import (
    Parts,
    adds_special,
    answer_beginning,
    padding,
    parts_of,
    usual_length,
    with_mask,
)
from coremerge.learning.rows import Example, one_kind
from coremerge.learning.sounds import read_sound

_NOT_FOR_THE_MODEL = frozenset(
    {"labels", "length", "num_truncated_tokens", "offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask"}
)


def make_batches(
    examples: Sequence[Example], processor: Any, *, size: int = 16, max_length: int | None = None, cut: str = "right"
) -> list[Batch]:
    """Tensors by the names that the model gives them; inputs of similar lengths together, in the same order each time.

    Chats, and texts with an image, come with a ``token_mask``: special tokens and those that stand for the image do not
    count, but the one before an answer does. A chat that does not end with an answer ends where one would begin; one
    that is too long is cut at its beginning. The processor is as it was afterwards.

    Args:
        examples: all of one kind.
        processor: see :func:`~coremerge.learning.processor.load_processor`.
        size: inputs of a batch; the last may have fewer.
        max_length: tokens that a text is cut to, without an image's; by default as many as the tokenizer says, at most
            512.
        cut: the side on which a text that is too long is cut, if it is no chat.

    Raises:
        ConfigError: inputs of several kinds, or of one that the processor does not take.
        InputError: none at all, or one that the processor or its chat template refuses.
        SourceError: an image or a sound that cannot be read.
    """
    return [batch for _, batch in placed_batches(examples, processor, size=size, max_length=max_length, cut=cut)]


def placed_batches(
    examples: Sequence[Example], processor: Any, *, size: int = 16, max_length: int | None = None, cut: str = "right"
) -> list[tuple[list[int], Batch]]:
    """Those of :func:`make_batches`, each with its inputs' places among ``examples``."""
    for key, value in (("size", size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ConfigError("at least 1 is needed", key=key, value=value)
    kind = one_kind(examples)
    parts = parts_of(processor)
    with padding(parts.tokenizer, cut):
        plan = _PLANS[kind](examples, parts, max_length or usual_length(parts.tokenizer))
    order = sorted(range(len(examples)), key=plan.lengths.__getitem__)
    chunks = [order[at : at + size] for at in range(0, len(order), size)]
    with padding(parts.tokenizer, plan.cut or cut):
        return [(chunk, _tensors(plan.encode(chunk))) for chunk in chunks]


@dataclass(frozen=True)
class _Plan:
    """How inputs are encoded.

    Attributes:
        lengths: of each, so that similar ones go together.
        encode: places of some to a batch.
        cut: the side on which a text that is too long is cut; None: as is asked for.
    """

    lengths: Sequence[int]
    encode: Callable[[Sequence[int]], Mapping[str, Any]]
    cut: str | None = None


def _tensors(batch: Mapping[str, Any]) -> Batch:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and key not in _NOT_FOR_THE_MODEL}


def _texts(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    return _tokenized([e.text or "" for e in examples], [e.pair for e in examples], parts, limit)


def _tokenized(
    texts: Sequence[str], pairs: Sequence[str | None], parts: Parts, limit: int, cut: str | None = None, **settings: Any
) -> _Plan:
    if parts.tokenizer is None:
        raise ConfigError("the base model takes images, not texts", key="data", remedy="Give a folder of images")

    def encode(rows: Sequence[int], **more: Any) -> Mapping[str, Any]:
        second = [pairs[i] for i in rows] if pairs[0] is not None else None
        encoded: Mapping[str, Any] = parts.tokenizer(
            [texts[i] for i in rows], second, truncation=True, max_length=limit, **settings, **more
        )
        return encoded

    lengths = [len(ids) for ids in encode(range(len(texts)))["input_ids"]]
    return _Plan(lengths, partial(encode, padding=True, return_tensors="pt"), cut)


def _chats(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    chats = [render(example, parts) for example in examples]
    texts = [chat.text for chat in chats]
    special = adds_special(texts, parts)
    plan = _tokenized(texts, [None] * len(texts), parts, limit, cut="left", add_special_tokens=special)

    def encode(rows: Sequence[int]) -> Mapping[str, Any]:
        batch = plan.encode(rows)
        kept = batch["attention_mask"].sum(1).tolist()
        found = [_deciding(chats[i], count, parts, special) for i, count in zip(rows, kept, strict=True)]
        return with_mask(batch, parts, found)

    return _Plan(plan.lengths, encode, plan.cut)


def _deciding(chat: Chat, kept: int, parts: Parts, special: bool) -> list[int]:
    """Positions of a chat's last ``kept`` tokens before which answers begin."""

    def count(text: str) -> int:
        return len(parts.tokenizer(text, add_special_tokens=special)["input_ids"])

    cut = count(chat.text) - kept
    ends = (chat.text[:start].rstrip(" ") if start < len(chat.text) else chat.text for start in chat.starts)
    return [place for text in ends if text and (place := count(text) - 1 - cut) >= 0]


def _images(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    if parts.pictures is None:
        raise ConfigError("the base model takes no images", key="data", remedy="Give texts")
    if parts.image_token is not None:
        raise ConfigError(
            "the base model takes an image as a part of a text", key="data",
            remedy="Give JSON lines with the keys text and image",
        )  # fmt: skip

    def encode(rows: Sequence[int]) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = parts.pictures(images=[_open(examples[i]) for i in rows], return_tensors="pt")
        return encoded

    return _Plan([0] * len(examples), encode)


def _open(example: Example) -> Any:
    image, ops = optional("PIL.Image"), optional("PIL.ImageOps")
    source = BytesIO(example.image) if isinstance(example.image, bytes) else example.image
    try:
        with image.open(source) as picture:
            return ops.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise SourceError(
            f"this image cannot be read: {first_line(error)}", file=example.place or None, key="image",
            value="bytes" if isinstance(example.image, bytes) else str(example.image),
        ) from None  # fmt: skip


def _sounds(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    if parts.sounds is None:
        raise ConfigError("the base model takes no sounds", key="data", remedy="Give texts")
    rate, first = int(parts.sounds.sampling_rate), answer_beginning(parts.tokenizer)

    def encode(rows: Sequence[int]) -> Mapping[str, Any]:
        sounds = [read_sound(examples[i], rate) for i in rows]
        encoded = dict(parts.sounds(sounds, sampling_rate=rate, return_tensors="pt"))
        return encoded | ({"decoder_input_ids": torch.tensor([first] * len(rows))} if len(first) > 1 else {})

    return _Plan([0] * len(examples), encode)


def _texts_with_images(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    _check_both(parts)
    return _pictured([_with_image(_cut(e.text or "", parts, limit), parts) for e in examples], examples, parts, limit)


def _chats_with_images(examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    _check_both(parts)
    return _pictured([render(example, parts).text for example in examples], examples, parts, limit)


def _check_both(parts: Parts) -> None:
    if parts.tokenizer is None or parts.pictures is None:
        raise ConfigError("the base model does not take texts and images together", key="data")


def _pictured(texts: Sequence[str], examples: Sequence[Example], parts: Parts, limit: int) -> _Plan:
    # an image's tokens must not be cut: where it has some, the text alone has been
    length = {"truncation": True, "max_length": limit} if parts.image_token is None else {}
    settings = length | {"add_special_tokens": adds_special(texts, parts)}

    def encode(rows: Sequence[int]) -> Mapping[str, Any]:
        pictures = [_open(examples[i]) for i in rows]
        nested = pictures if parts.image_token is None else [[picture] for picture in pictures]
        try:
            batch = parts.whole(
                text=[texts[i] for i in rows], images=nested, padding=True, return_tensors="pt", **settings
            )
        except (ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"the processor refuses a text with its image: {first_line(error)}",
                file=", ".join(examples[i].place for i in rows[:3]) or None,
                remedy="Give one image a text, and its token at most once in the text",
            ) from None
        return batch if parts.image_token is None else with_mask(batch, parts)

    return _Plan([len(ids) for ids in parts.tokenizer(texts, add_special_tokens=False)["input_ids"]], encode)


def _cut(text: str, parts: Parts, limit: int) -> str:
    settings = {"add_special_tokens": False, "truncation": True}
    tokens = parts.tokenizer(text, max_length=limit + 1, **settings)["input_ids"]
    kept = tokens[-limit:] if parts.tokenizer.truncation_side == "left" else tokens[:limit]
    return text if len(tokens) <= limit else str(parts.tokenizer.decode(kept))


def _with_image(text: str, parts: Parts) -> str:
    """``text`` with the image's token in it: by the chat template, where that knows images, or in front."""
    token = parts.image_token
    if token is None or token in text:
        return text
    if getattr(parts.whole, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        said = str(parts.whole.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        if text.strip() in said and any(
            mark in said for mark in (token, getattr(parts.whole, "boi_token", None)) if mark
        ):
            return said
    return f"{token}\n{text}"


_PLANS: Mapping[str, Callable[[Sequence[Example], Parts, int], _Plan]] = {
    "text": _texts,
    "text and pair": _texts,
    "messages": _chats,
    "image": _images,
    "audio": _sounds,
    "text and image": _texts_with_images,
    "messages and image": _chats_with_images,
}
