"""Text that may be shown and kept: without what a terminal or an editor would obey, and without secrets.

Names and notes come from other people's files, and messages quote them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable

HIDDEN = "***"
"""In place of a secret."""

_SECRET_WORD = r"(?:token|password|passwd|secret|api[-_]?key|signature)"
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|(?<=://)[^\s/@\"'\\]+(?=@)"
    rf"|((?i:{_SECRET_WORD}=|--[\w-]*{_SECRET_WORD} |[?&;]sig=))[^\s&,;\"'\\]+"
)
"""A hub token, who somebody is in an address, and what is given under a name that says so."""

_SECRET_OPTION = re.compile(rf"--?[\w-]*{_SECRET_WORD}", re.IGNORECASE)
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8
"""Characters of a token: a shorter value of the variable would be found in other words."""


def visible(text: object) -> str:
    """``text`` on one line; control characters, direction marks and half characters are spelt out.

    Example:
        >>> visible("a\\x1b[31mb\\nc\\u202ed")
        'a\\\\x1b[31mb c\\\\u202ed'
    """
    said = str(text)
    return said if said.isprintable() else "".join(map(_spelt, said))


def _spelt(character: str) -> str:
    if character.isspace():
        return " "
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def visible_lines(text: str) -> str:
    """``text`` with its lines; what else a terminal or a browser would obey is spelt out."""
    return "\n".join(map(visible, text.split("\n")))


def visible_json(text: str) -> str:
    """JSON of the same meaning that can be printed: what is not printable stands as ``\\u001b``."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def redacted(text: str) -> str:
    """``text`` without hub tokens (also the one in the environment), passwords in addresses and their like.

    Example:
        >>> redacted("https://me:word@host/x?token=abc, hf_" + "a" * 34)
        'https://***@host/x?token=***, ***'
    """
    for name in _TOKENS:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST:
            text = text.replace(token, HIDDEN)
    return _SECRET.sub(lambda found: (found[1] or "") + HIDDEN, text)


def redacted_words(words: Iterable[str]) -> list[str]:
    """The words of a command; an option whose name says that it is a secret keeps its value to itself.

    Example:
        >>> redacted_words(["merge", "A", "--token", "abc", "--password=abc"])
        ['merge', 'A', '--token', '***', '--password=***']
    """
    kept: list[str] = []
    for word in words:
        after = bool(kept) and _SECRET_OPTION.fullmatch(kept[-1])
        kept.append(HIDDEN if after else redacted(word))
    return kept


def size(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(999), size(12_345_678)
        ('999 B', '12.3 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
