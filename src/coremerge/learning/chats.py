"""Chats by the model's own template, and the places in them where an answer is about to begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from coremerge.errors import ConfigError, InputError
from coremerge.learning.optional import first_line
from coremerge.learning.processor import Parts
from coremerge.learning.rows import Example, Message

ASSISTANT = "assistant"
"""The role whose turns are answers."""


@dataclass(frozen=True)
class Chat:
    """A chat as the template writes it.

    Attributes:
        text: all of it; where the last turn is not an answer, up to where one would begin.
        starts: places in ``text`` (characters) where an answer begins: of each turn of the assistant, and of the one
            that is asked for.
    """

    text: str
    starts: tuple[int, ...]


def render(example: Example, parts: Parts) -> Chat:
    """``example``'s messages by the chat template.

    Content goes in as a string or as a list of parts, whichever the template reads; an image is a part of the first
    turn that is the user's, before its text. A chat that does not end with an answer is rendered with
    ``add_generation_prompt``: the position that decides the answer's first token is then its last.

    Raises:
        ConfigError: there is no chat template.
        InputError: the template refuses the messages, or leaves out what they say.
    """
    turns = example.messages or ()
    problem = "leaves out what the messages say"
    for template in _templates(example, parts):
        try:
            text = template.text(turns)
        except _REFUSALS as error:
            problem = f"refuses it: {first_line(error)}"
            continue
        if any(turn.content.strip() in text for turn in turns if turn.content.strip()):
            return Chat(text, tuple(_starts(template, turns, text)))
    raise InputError(f"the chat template {problem}", file=example.place or None, key="messages")


def awaits(turns: Sequence[Message]) -> bool:
    """Whether an answer comes next."""
    return not turns or turns[-1].role != ASSISTANT


_REFUSALS = (TemplateError, ValueError, TypeError, KeyError)


@dataclass(frozen=True)
class _Template:
    """A tokenizer's or processor's template, and the form of content that it reads."""

    holder: Any
    listed: bool
    image: bool

    def text(self, turns: Sequence[Message], answer: bool | None = None) -> str:
        """The turns, with what comes before an answer where one is to follow."""
        follows = awaits(turns) if answer is None else answer
        messages = [self._message(turn, at == self._pictured(turns)) for at, turn in enumerate(turns)]
        return str(self.holder.apply_chat_template(messages, tokenize=False, add_generation_prompt=follows))

    def _pictured(self, turns: Sequence[Message]) -> int | None:
        users = [at for at, turn in enumerate(turns) if turn.role == "user"]
        return users[0] if self.image and users else None

    def _message(self, turn: Message, pictured: bool) -> Mapping[str, object]:
        if not self.listed:
            return {"role": turn.role, "content": turn.content}
        said = [{"type": "text", "text": turn.content}]
        return {"role": turn.role, "content": [{"type": "image"}, *said] if pictured else said}


def _templates(example: Example, parts: Parts) -> list[_Template]:
    image = example.image is not None
    tried = [(parts.whole, True)] if image else [(parts.tokenizer, False), (parts.tokenizer, True), (parts.whole, True)]
    found = [_Template(holder, listed, image) for holder, listed in tried if getattr(holder, "chat_template", None)]
    if not found:
        raise ConfigError(
            "the base model's tokenizer has no chat template", key="messages",
            remedy="Give the model that the adapters were trained on, or inputs with the key text",
        )  # fmt: skip
    return found


def _starts(template: _Template, turns: Sequence[Message], text: str) -> Iterator[int]:
    for at, turn in enumerate(turns):
        if turn.role == ASSISTANT:
            start = text.find(turn.content.strip(), _end_of(template, turns[:at], text))
            if start >= 0:
                yield start
    if awaits(turns):
        yield len(text)


def _end_of(template: _Template, before: Sequence[Message], text: str) -> int:
    """Where in ``text`` the turns before an answer end, its own marker included where the template tells it."""
    for answer in (True, False):
        try:
            beginning = template.text(before, answer)
        except _REFUSALS:  # of no turns at all, most often
            continue
        if text.startswith(beginning):
            return len(beginning)
    return 0
