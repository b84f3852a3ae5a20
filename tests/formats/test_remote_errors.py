"""What stores' clients raise, in our words."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from coremerge.errors import SourceError
from coremerge.formats.remote_errors import told

URL = "s3://bucket/a"


class NoCredentialsError(Exception):
    """As botocore has it."""


class HttpError(Exception):
    """As many have it."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("Install s3fs to access S3"),
            r"s3:// needs a package that is not installed\. pip install .*\[s3\]",
        ),
        (FileNotFoundError("bucket/a"), r"is not there\. Check the spelling"),
        (TimeoutError(), r"no answer in time\. Check the address"),
        (asyncio.TimeoutError(), "no answer in time"),
        (PermissionError("Access Denied"), r"may not be read, or is not there: Access Denied\. Set AWS_PROFILE"),
        (NoCredentialsError("Unable to locate credentials"), "may not be read.*Unable to locate.*AWS_PROFILE"),
        (HttpError("Forbidden", 403), r"may not be read.*: Forbidden\. "),
        (HttpError("Server Error\nTrace", 500), r"cannot be fetched: Server Error\. Check the address, and try again"),
        (OSError(errno.ENOSPC, "No space left"), r"cannot be kept in .*c: No space left\. .*COREMERGE_CACHE"),
        (PermissionError(errno.EACCES, "Permission denied", "/c/x"), r"cannot be kept in .*: Permission denied"),
        (RuntimeError(), "cannot be fetched: RuntimeError"),
    ],
)
def test_each_has_a_remedy(error: Exception, said: str) -> None:
    with pytest.raises(SourceError, match=rf"^{URL}: {said}") as refused, told(URL, "s3", Path("/c")):
        raise error
    assert refused.value.remedy and refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("scheme", "remedy"),
    [("gcs", "GOOGLE_"), ("abfss", "AZURE_"), ("https", "netrc"), ("hf", "HF_TOKEN"), ("oci", "Give this user")],
)
def test_every_store_has_logins_of_its_own(scheme: str, remedy: str) -> None:
    with pytest.raises(SourceError, match=remedy), told(f"{scheme}://a", scheme, Path("/c")):
        raise PermissionError("no")


def test_what_is_refused_already_stays() -> None:
    with pytest.raises(SourceError, match=r"^mine$"), told(URL, "s3", Path("/c")):
        raise SourceError("mine")
    with pytest.raises(KeyboardInterrupt), told(URL, "s3", Path("/c")):
        raise KeyboardInterrupt


def test_addresses_in_messages_lose_what_may_be_a_signature() -> None:
    error = HttpError("403, url='https://me:word@host/x?Policy=AbC&sig=AbC' (and http://y/?AbC)", 403)
    with pytest.raises(SourceError) as refused, told("https://me:word@host/x", "https", Path("/c")):
        raise error
    assert "AbC" not in repr(vars(refused.value)) and "word" not in str(refused.value)
