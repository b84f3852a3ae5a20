"""One unlabelled input: a text, two, a chat, an image, a sound, or a text or a chat with an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from coremerge.errors import ConfigError, InputError
from coremerge.learning.optional import optional

KINDS = ("text", "text and pair", "messages", "image", "audio", "text and image", "messages and image")
"""What an input can consist of; one kind for all inputs of a task."""

KEYS = ("text", "pair", "text_pair", "messages", "image", "audio")
SOURCES = "Give a .jsonl or .txt file, a folder of images, a saved data set, or one of the hub: org/name[@revision]"
GIVE = (
    'Give {"text": ...}, {"text": ..., "pair": ...}, {"messages": [...]}, {"image": PATH}, {"audio": PATH},'
    " or an image beside text or messages"
)


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


_PARTS = ("text", "pair", "messages", "image", "audio")


@dataclass(frozen=True)
class Example:
    """One input.

    Attributes:
        text: if it has one.
        pair: a second text, that goes in together with the first.
        messages: a chat.
        image: a file, or its bytes.
        audio: a WAV file, or its bytes.
        place: where it is from, for error messages.
    """

    text: str | None = None
    pair: str | None = None
    messages: tuple[Message, ...] | None = None
    image: Path | bytes | None = field(default=None, repr=False)
    audio: Path | bytes | None = field(default=None, repr=False, kw_only=True)
    place: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`, if it is well-formed."""
        return " and ".join(key for key in _PARTS if getattr(self, key) is not None)


def one_kind(examples: Sequence[Example]) -> str:
    """The kind (see :data:`KINDS`) that all of them are.

    Raises:
        InputError: there are none.
        ConfigError: some are of another kind.
    """
    if not examples:
        raise InputError("no inputs", remedy="Give at least one")
    first = examples[0]
    for example in examples:
        if example.kind != first.kind:
            raise ConfigError(
                f"this input is {example.kind}, but the one at {first.place or 'the beginning'} is {first.kind}",
                file=example.place, remedy="Put inputs of different kinds into different files",
            )  # fmt: skip
    return first.kind


def parse_row(row: Mapping[str, Any], place: str, folder: Path | None) -> Example | None:
    """None where there is nothing but blank text."""
    found = {key: row[key] for key in KEYS if row.get(key) is not None}
    if "pair" not in found and "text_pair" in found:
        found["pair"] = found.pop("text_pair")
    text, pair = (_string(found[key], key, place) if key in found else None for key in ("text", "pair"))
    messages = read_messages(found["messages"], place) if "messages" in found else None
    image, audio = (read_path(found[key], key, place, folder) if key in found else None for key in ("image", "audio"))
    example = Example(text, pair, messages, image, place, audio=audio)
    if "text_pair" in found or example.kind not in KINDS:
        raise ConfigError(
            f"these keys make no input: {', '.join(found)}" if found else "no key of an input", file=place,
            remedy=f"{GIVE}; its keys: {', '.join(map(str, row)) or 'none'}",
        )  # fmt: skip
    said = [turn.content for turn in messages or ()] or [text or ""]
    return example if image is not None or audio is not None or any(part.strip() for part in said) else None


def _string(value: object, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError("a string is needed", file=place, key=key, value=value)
    return value


def read_messages(value: object, place: str) -> tuple[Message, ...]:
    """The turns of a chat.

    Raises:
        ConfigError: it is none.
    """
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in value)  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        messages = ()
    if not messages or not all(isinstance(part, str) for turn in messages for part in turn):
        raise ConfigError(
            "no chat", file=place, key="messages", value=value,
            remedy='Give [{"role": "user", "content": "..."}, ...], role and content strings',
        )  # fmt: skip
    return messages


def read_path(value: object, key: str, place: str, folder: Path | None) -> Path | bytes:
    """An image's or a sound's file, or its bytes.

    Args:
        value: a path relative to ``folder``, or what a data set holds of a column of them.
        key: what it is: ``"image"`` or ``"audio"``.
        place: of the row, for error messages.
        folder: of the file that names it; None: a data set of the hub does.

    Raises:
        ConfigError: it is neither.
    """
    undecoded = isinstance(value, Mapping)
    if isinstance(value, Mapping):  # of a data set's column of images or sounds
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    path = Path(_string(value, key, place)).expanduser()
    if folder is None and not (undecoded and _is_cached(path)):
        raise ConfigError(
            "a path, which a data set of the hub cannot follow", file=place, key=key, value=str(value),
            remedy="Take a data set that holds the files themselves, or write the inputs to a .jsonl file",
        )  # fmt: skip
    return path if folder is None else folder / path


def _is_cached(path: Path) -> bool:
    """Whether it was downloaded: a data set of the hub could name any other file of this machine, too."""
    config, hub = optional("datasets").config, optional("huggingface_hub").constants
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, hub.HF_HUB_CACHE)
    return path.is_absolute() and any(path.resolve().is_relative_to(Path(cache).resolve()) for cache in caches)
