"""SHA-256 beside other work."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coremerge import hashing
from coremerge.errors import SourceError
from coremerge.hashing import Hashes, check_download, check_unchanged, file_sha256, stamp_of, stamps

CONTENT = bytes(range(256)) * 40_000  # more than two blocks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_it_is_the_hash(file: Path) -> None:
    assert file_sha256(file) == hashlib.sha256(CONTENT).hexdigest()


def test_each_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    slow = hashing._sha256
    monkeypatch.setattr(hashing, "_sha256", lambda path, stop: read.append(path) or slow(path, stop))
    link = file.with_name("link")
    link.symlink_to(file)
    with Hashes() as hashes:
        hashes.start(link)
        assert hashes[file] == hashes[link] == file_sha256(file)
    assert read == [file, file]  # the second is the plain one above


def test_a_file_that_has_changed_is_read_again(file: Path) -> None:
    with Hashes() as hashes:
        before = hashes[file]
        file.write_bytes(CONTENT[::-1])
        os.utime(file, ns=(1, 1))
        assert hashes[file] == file_sha256(file) != before


def test_an_unreadable_file_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    with Hashes() as hashes:
        hashes.start(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError):
            hashes[tmp_path / "nothing"]


def test_leaving_does_not_wait_for_the_rest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = Hashes()
    hashes._stop.set()
    hashes.start(file)
    hashes.__exit__()
    assert hashes[file] != file_sha256(file)


def test_torch_is_not_imported() -> None:
    code = "import sys, coremerge.hashing; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_hash_is_that_of_the_file_that_was_read(file: Path) -> None:
    known = stamp_of(file)
    with Hashes() as hashes:
        assert hashes.of(file, known) == file_sha256(file)
        file.write_bytes(CONTENT[::-1] + b"x")
        with pytest.raises(SourceError, match="changed while it was in use"):
            hashes.of(file, known)
        file.unlink()
        with pytest.raises(SourceError, match="cannot be read: No such file"):
            hashes.of(file, known)


def test_a_file_that_was_read_before_it_was_hashed(file: Path) -> None:
    known = stamp_of(file)
    os.utime(file, ns=(0, 0))
    with Hashes() as hashes, pytest.raises(SourceError, match="changed"):
        hashes.of(file, known)


def test_stamps(file: Path) -> None:
    known = stamps([file])
    check_unchanged(known)
    os.truncate(file, 3)
    with pytest.raises(SourceError, match=r"file: changed while it was in use. Wait until"):
        check_unchanged(known)
    file.unlink()
    with pytest.raises(SourceError, match=r"No such file or directory. Check that"):
        stamps([file])


def test_what_the_hub_does_not_have_leaves_its_cache(tmp_path: Path) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    blob = tmp_path / "models--org--name" / "blobs" / right
    blob.parent.mkdir(parents=True)
    (tmp_path / "link").symlink_to(blob)
    for content in (CONTENT, CONTENT[1:]):
        blob.write_bytes(content)
        if content is CONTENT:
            check_download(tmp_path / "link", file_sha256(blob))
    with pytest.raises(SourceError, match=r"not the bytes that the hub has. It was removed"):
        check_download(tmp_path / "link", file_sha256(blob))
    assert not blob.exists()
    (tmp_path / "plain").write_bytes(CONTENT)
    check_download(tmp_path / "plain", right[::-1])
