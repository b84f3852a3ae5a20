"""From inputs to batches, as a model of ``transformers`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from coremerge.errors import ConfigError, InputError, SourceError
from coremerge.formats.source import local_path, parse_hub_id
from coremerge.learning.examples import Example, first_line, one_kind, optional, read_examples
from coremerge.learning.forward import TOKEN_MASK, Batch

__all__ = ["Example", "load_processor", "make_batches", "read_examples"]

MOST_TOKENS = 512
"""Of a text, unless more are asked for."""

_NOT_FOR_THE_MODEL = frozenset(
    {"labels", "length", "num_truncated_tokens", "offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask"}
)


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
    if local_path(base):
        return str(base), {}
    hub = parse_hub_id(str(base))
    if hub is None:
        raise SourceError("no such base model", file=base, remedy="Give its folder or its hub id")
    return hub.repo, {"revision": hub.revision, "subfolder": hub.subfolder or ""}


def _loaded(load: Callable[..., Any], problems: list[str]) -> Any:
    try:
        processor = load(trust_remote_code=False)
        _check(_parts(processor))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        problems.append(first_line(error))
        return None
    return processor


def make_batches(
    examples: Sequence[Example], processor: Any, *, size: int = 16, max_length: int | None = None
) -> list[Batch]:
    """Tensors by the names that the model gives them; inputs of similar lengths together, in the same order each time.

    Chats, and texts with an image, come with a ``token_mask``: special tokens and those that stand for the image do not
    count. The processor is as it was afterwards.

    Args:
        examples: all of one kind.
        processor: see :func:`load_processor`.
        size: inputs of a batch; the last may have fewer.
        max_length: tokens that a text is cut to, without an image's; by default as many as the tokenizer says, at most
            512.

    Raises:
        ConfigError: inputs of several kinds, or of one that the processor does not take.
        InputError: none at all, or one that the processor or its chat template refuses.
        SourceError: an image that cannot be read.
    """
    for key, value in (("size", size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ConfigError("at least 1 is needed", key=key, value=value)
    kind = one_kind(examples)
    parts = _parts(processor)
    plan = _PLANS[kind](examples, parts, max_length or _usual_length(parts.tokenizer))
    order = sorted(range(len(examples)), key=plan.lengths.__getitem__)
    with _padding(parts.tokenizer):
        return [_tensors(plan.encode(order[at : at + size])) for at in range(0, len(order), size)]


@dataclass(frozen=True)
class _Parts:
    """A processor and what it consists of, where it has that."""

    whole: Any
    tokenizer: Any
    pictures: Any

    @property
    def image_token(self) -> str | None:
        """What stands for an image in a text, if images go there."""
        token = getattr(self.whole, "image_token", None) if self.pictures is not None else None
        return None if token is None else str(token)


@dataclass(frozen=True)
class _Plan:
    """How inputs are encoded.

    Attributes:
        lengths: of each, so that similar ones go together.
        encode: places of some to a batch.
    """

    lengths: Sequence[int]
    encode: Callable[[Sequence[int]], Mapping[str, Any]]


def _parts(processor: Any) -> _Parts:
    if isinstance(processor, optional("transformers").PreTrainedTokenizerBase):
        return _Parts(processor, processor, None)
    if hasattr(processor, "preprocess"):
        return _Parts(processor, None, processor)
    return _Parts(processor, getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None))


def _check(parts: _Parts) -> None:
    if parts.tokenizer is None and parts.pictures is None:
        raise ValueError(f"{type(parts.whole).__name__} takes neither texts nor images")
    if parts.tokenizer is not None and len(parts.tokenizer) <= len(_special(parts.tokenizer)) + 1:
        raise ValueError("there are no files of a tokenizer")  # transformers then makes one up that knows no word


def _usual_length(tokenizer: Any) -> int:
    return int(min(getattr(tokenizer, "model_max_length", None) or MOST_TOKENS, MOST_TOKENS))


@contextmanager
def _padding(tokenizer: Any) -> Iterator[None]:
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


def _tensors(batch: Mapping[str, Any]) -> Batch:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and key not in _NOT_FOR_THE_MODEL}


def _texts(examples: Sequence[Example], parts: _Parts, limit: int) -> _Plan:
    return _tokenized([e.text or "" for e in examples], [e.pair for e in examples], parts, limit)


def _tokenized(texts: Sequence[str], pairs: Sequence[str | None], parts: _Parts, limit: int, **settings: Any) -> _Plan:
    if parts.tokenizer is None:
        raise ConfigError("the base model takes images, not texts", key="data", remedy="Give a folder of images")

    def encode(rows: Sequence[int], **more: Any) -> Mapping[str, Any]:
        second = [pairs[i] for i in rows] if pairs[0] is not None else None
        encoded: Mapping[str, Any] = parts.tokenizer(
            [texts[i] for i in rows], second, truncation=True, max_length=limit, **settings, **more
        )
        return encoded

    lengths = [len(ids) for ids in encode(range(len(texts)))["input_ids"]]
    return _Plan(lengths, partial(encode, padding=True, return_tensors="pt"))


def _chats(examples: Sequence[Example], parts: _Parts, limit: int) -> _Plan:
    texts = [_as_text(example, parts) for example in examples]
    plan = _tokenized(texts, [None] * len(texts), parts, limit, add_special_tokens=_adds_special(texts, parts))
    return _Plan(plan.lengths, lambda rows: _with_mask(plan.encode(rows), parts))


def _as_text(example: Example, parts: _Parts) -> str:
    """A chat by the template; content goes in as a string or as a list of parts, whichever the template reads."""
    turns = example.messages or ()
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    listed = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in turns]
    tried = [(parts.tokenizer, plain), (parts.tokenizer, listed), (parts.whole, listed)]
    tried = [(holder, messages) for holder, messages in tried if getattr(holder, "chat_template", None)]
    if not tried:
        raise ConfigError(
            "the base model's tokenizer has no chat template", key="messages",
            remedy="Give the model that the adapters were trained on, or inputs with the key text",
        )  # fmt: skip
    problem = "leaves out what the messages say"
    for holder, messages in tried:
        try:
            text = str(holder.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            problem = f"refuses it: {first_line(error)}"
            continue
        if any(turn.content.strip() in text for turn in turns if turn.content.strip()):
            return text
    raise InputError(f"the chat template {problem}", file=example.place or None, key="messages")


def _adds_special(texts: Sequence[str], parts: _Parts) -> bool:
    """Templates of tokenizers hold all special tokens; those of processors not always the first."""
    begin = parts.tokenizer.bos_token if parts.tokenizer is not None else None
    return parts.whole is not parts.tokenizer and not (begin and all(text.startswith(begin) for text in texts))


def _with_mask(batch: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    ids = batch["input_ids"]
    counts = batch["attention_mask"].bool() & ~torch.isin(
        ids, torch.tensor(sorted(_no_content(parts)), dtype=ids.dtype)
    )
    return {**batch, TOKEN_MASK: counts.to(batch["attention_mask"].dtype)}


def _no_content(parts: _Parts) -> set[int]:
    found = _special(parts.tokenizer)
    if parts.image_token is not None:
        known = getattr(parts.whole, "image_token_id", None)
        found.add(parts.tokenizer.convert_tokens_to_ids(parts.image_token) if known is None else known)
    return found


def _special(tokenizer: Any) -> set[int]:
    """More than ``get_special_tokens_mask`` knows: chat markers are often special without a name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def _images(examples: Sequence[Example], parts: _Parts, limit: int) -> _Plan:
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


def _texts_with_images(examples: Sequence[Example], parts: _Parts, limit: int) -> _Plan:
    if parts.tokenizer is None or parts.pictures is None:
        raise ConfigError("the base model does not take texts and images together", key="data")
    texts = [_with_image(_cut(example.text or "", parts, limit), parts) for example in examples]
    # an image's tokens must not be cut: where it has some, the text alone has been
    length = {"truncation": True, "max_length": limit} if parts.image_token is None else {}
    settings = length | {"add_special_tokens": _adds_special(texts, parts)}

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
        return batch if parts.image_token is None else _with_mask(batch, parts)

    return _Plan([len(ids) for ids in parts.tokenizer(texts, add_special_tokens=False)["input_ids"]], encode)


def _cut(text: str, parts: _Parts, limit: int) -> str:
    settings = {"add_special_tokens": False, "truncation": True}
    tokens = parts.tokenizer(text, max_length=limit + 1, **settings)["input_ids"]
    return text if len(tokens) <= limit else str(parts.tokenizer.decode(tokens[:limit]))


def _with_image(text: str, parts: _Parts) -> str:
    """``text`` with the image's token in it: by the chat template, where that knows images, or in front."""
    token = parts.image_token
    if token is None or token in text:
        return text
    if getattr(parts.whole, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        said = str(parts.whole.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        if text.strip() in said and any(
            mark in said for mark in (token, getattr(parts.whole, "boi_token", None)) if mark
        ):
            return said
    return f"{token}\n{text}"


_PLANS: Mapping[str, Callable[[Sequence[Example], _Parts, int], _Plan]] = {
    "text": _texts,
    "text and pair": _texts,
    "messages": _chats,
    "image": _images,
    "text and image": _texts_with_images,
}
