"""SHA-256 beside other work."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from coremerge import hashing
from coremerge.hashing import Hashes, file_sha256

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
