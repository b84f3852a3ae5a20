"""What goes wrong when a file behind a URL is fetched, in our words: every store has errors of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC, EROFS
from pathlib import Path

from coremerge.errors import CoremergeError, SourceError
from coremerge.formats.urls import EXTRAS
from coremerge.installing import install
from coremerge.text import HIDDEN

_S3 = "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for what is public"
_GS = "Set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login"
_AZ = "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
_WEB = "Put the login for this host into ~/.netrc"
_LOGIN = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GS),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), _AZ),
    **dict.fromkeys(("http", "https"), _WEB),
    "hf": "Set HF_TOKEN",
}


@contextmanager
def told(url: str, scheme: str, cache: Path) -> Iterator[None]:
    """Turn whatever a store's client raises into a :class:`SourceError` about ``url``."""
    try:
        yield
    except CoremergeError:
        raise
    except Exception as error:  # every client has a tree of its own, and lets through those of its layers
        raise _refusal(url, scheme, cache, error) from None


def failed_status(error: BaseException) -> int | None:
    """The HTTP status that an error is about, if any."""
    for holder in (error, getattr(error, "response", None), error.__cause__):
        for key in ("status", "status_code", "code"):
            found = getattr(holder, key, None)
            if str(found).isdigit():
                return int(str(found))
    return None


def _refusal(url: str, scheme: str, cache: Path, error: Exception) -> SourceError:
    said, status = _first_line(error), failed_status(error)
    if isinstance(error, ImportError) or said.startswith("Protocol not known"):  # fsspec knows some by their packages
        remedy = install(EXTRAS[scheme]) if scheme in EXTRAS else said
        return SourceError(f"{scheme}:// needs a package that is not installed", file=url, remedy=remedy)
    if isinstance(error, OSError) and _is_local(error, cache):
        remedy = "Free some space, or set COREMERGE_CACHE to another folder"
        return SourceError(f"cannot be kept in {cache}: {error.strerror or said}", file=url, remedy=remedy)
    if isinstance(error, FileNotFoundError):
        return SourceError("is not there", file=url, remedy="Check the spelling, and that nothing removes it meanwhile")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return SourceError("no answer in time", file=url, remedy="Check the address, and try again")
    if isinstance(error, PermissionError) or status in (401, 403) or "credential" in f"{type(error)} {said}".lower():
        remedy = _LOGIN.get(scheme, "Give this user the right to")
        return SourceError(f"may not be read, or is not there: {said}", file=url, remedy=remedy)
    return SourceError(f"cannot be fetched: {said}", file=url, remedy="Check the address, and try again")


def _is_local(error: OSError, cache: Path) -> bool:
    here = error.filename is not None and Path(str(error.filename)).is_relative_to(cache)
    return here or error.errno in (ENOSPC, EDQUOT, EFBIG, EROFS)


def _first_line(error: Exception) -> str:
    """What it says, without what follows a question mark in an address: that may be a signature."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
    return re.sub(r"\?[^\s'\")]+", f"?{HIDDEN}", first)
