"""URLs of adapters and base models: which are read, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coremerge.errors import SourceError
from coremerge.formats.source import in_full, local_path
from coremerge.formats.urls import SCHEMES, is_url, label, scheme_of, split


@pytest.mark.parametrize("source", ["s3://a/b", "S3://a", "simplecache::s3://a/b", "zip://x::file:///y", "x-y+z.1://a"])
def test_a_url_is_never_a_path(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not Path(source).is_absolute()
    Path(source).mkdir(parents=True)  # of the name that is left when a Path drops a slash
    assert is_url(source) and local_path(source) is None and in_full(source) == source


@pytest.mark.parametrize("source", ["a/b", "org/name@v1:sub", "C://a", "./a:/b", "", "://a", "file:///a", "FILE://a"])
def test_what_is_none(source: str) -> None:
    assert not is_url(source) and not is_url(Path(source))


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    there = tmp_path / "a b%"
    there.mkdir()
    for url in (there.as_uri(), f"FILE://localhost{tmp_path}/a%20b%", f"file://{there}"):
        assert local_path(url) == there and in_full(url) == str(there)
    assert local_path(f"file://elsewhere{there}") is None and local_path(f"file:///{'x' * 5000}") is None


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/runs//math", "math"),
        ("s3://bucket/math@v1/", "math@v1"),
        ("s3://bucket", "bucket"),
        ("https://me:word@host", "host"),
        ("memory://", "adapter"),
    ],
)
def test_the_label_is_the_last_part(url: str, name: str) -> None:
    assert label(url) == name


def test_a_folder_keeps_all_its_slashes() -> None:
    assert split("s3://bucket/a//b/c.safetensors") == ("s3://bucket/a//b", "c.safetensors")
    assert split("https://host/c.safetensors") == ("https://host", "c.safetensors")
    assert split("https://host") == ("https://", "host")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stores_are_read(scheme: str) -> None:
    assert scheme_of(f"{scheme.upper()}://a/b") == scheme


@pytest.mark.parametrize("scheme", ["reference", "dir", "git", "ssh", "sftp", "jupyter", "libarchive", "zip", "data"])
def test_what_reaches_elsewhere_is_refused(scheme: str) -> None:
    with pytest.raises(SourceError, match=rf"{scheme}:// is not read\. Give a local path, a hub id, or a URL.* s3, "):
        scheme_of(f"{scheme}://a/b")


@pytest.mark.parametrize("url", ["simplecache::s3://a/b", "zip://x.safetensors::https://a/b.zip", "s3://a::file:///b"])
def test_chains_are_refused(url: str) -> None:
    with pytest.raises(SourceError, match="one file system inside another is not read"):
        scheme_of(url)


@pytest.mark.parametrize("url", ["https://a/b?sv=1&sig=AbC%2F+=", "s3://a/b?x=AbC", "https://a/b#AbC", "zip://a?AbC"])
def test_what_may_be_signed_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SourceError) as refused:
        scheme_of(url)
    assert "AbC" not in f"{refused.value}{vars(refused.value)}" and re.search(r"[?#]\*\*\*", str(refused.value))
