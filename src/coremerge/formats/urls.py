"""URLs of adapters and base models: which are read, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from coremerge.errors import SourceError
from coremerge.text import HIDDEN

HTTP = ("http", "https")
SCHEMES = (
    "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hdfs", "webhdfs", "hf", *HTTP, "memory",
)  # fmt: skip
"""Stores of files. Others that fsspec knows read this machine's own files, take archives apart, or log in to other
machines: a URL in somebody's recipe shall not."""

EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "az"),
    **{scheme: scheme for scheme in ("oci", "oss", "hdfs", "webhdfs")},
    **dict.fromkeys(HTTP, "http"),
}
"""Scheme → the extra of this package that brings its client."""

_URL = re.compile(r"(?:[\w.+-]+::)*(?P<scheme>[A-Za-z][\w.+-]+)://")
_FILE = re.compile(r"(?i:file)://(?:localhost)?(?P<path>/.*)", re.DOTALL)


def is_url(source: object) -> bool:
    """Whether ``source`` is to be fetched; ``file://`` is a local path in other words.

    Example:
        >>> [is_url(source) for source in ("s3://bucket/math", "file:///math", "org/math", "C://math")]
        [True, False, False, False]
    """
    return isinstance(source, str) and bool(_URL.match(source)) and not source.lower().startswith("file://")


def unwrapped(source: str | Path) -> str | Path:
    """The path in a ``file://`` URL; anything else as it is.

    Example:
        >>> unwrapped("file:///a%20b")
        '/a b'
    """
    found = _FILE.fullmatch(source) if isinstance(source, str) else None
    return unquote(found["path"]) if found else source


def label(url: str) -> str:
    """The last part of its path, or else the bucket or host.

    Example:
        >>> label("s3://bucket/math/"), label("https://me:word@host")
        ('math', 'host')
    """
    place, _, path = url.partition("://")[2].rstrip("/").partition("/")
    return path.rpartition("/")[2] or place.rpartition("@")[2] or "adapter"


def split(url: str) -> tuple[str, str]:
    """The folder and the file, where ``url`` has both.

    Example:
        >>> split("s3://bucket/math/x.safetensors")
        ('s3://bucket/math', 'x.safetensors')
    """
    place, mark, path = url.partition("://")
    above, _, last = path.rpartition("/")
    return f"{place}{mark}{above}", last


def scheme_of(url: str) -> str:
    """What ``url`` begins with, in small letters.

    Raises:
        SourceError: it is not read.
    """
    found = _URL.match(url)
    scheme = found["scheme"].lower() if found else ""
    if "::" in url:
        raise SourceError(
            "one file system inside another is not read", file=_shown(url),
            remedy="Give the place of the files themselves, not of an archive or a cache around them",
        )  # fmt: skip
    if scheme not in SCHEMES:
        raise SourceError(
            f"{scheme}:// is not read", file=_shown(url),
            remedy=f"Give a local path, a hub id, or a URL that begins with {', '.join(SCHEMES)}",
        )  # fmt: skip
    if "?" in url or "#" in url:
        raise SourceError(
            "a URL with ? or # names one file, and an adapter has two; and it may hold a secret", file=_shown(url),
            remedy="Leave that part out; for a private store give its own URL: s3://, gs:// and az:// know your login",
        )  # fmt: skip
    return scheme


def _shown(url: str) -> str:
    return re.sub(r"[?#].*", lambda rest: rest[0][0] + HIDDEN, url, flags=re.DOTALL)
