"""Where files that were fetched are kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremerge.formats.remote_cache import STALE, alone, cache, partial_file, safe


def test_the_place_is_the_persons_to_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("COREMERGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache() == tmp_path / ".cache" / "coremerge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache() == tmp_path / "x" / "coremerge"
    monkeypatch.setenv("COREMERGE_CACHE", "~/y")
    assert cache() == tmp_path / "y"


@given(st.text())
def test_a_name_stays_in_its_folder(name: str) -> None:
    assert Path("/a", safe(name)).resolve().parent == Path("/a") and len(safe(name)) <= 60


def test_what_killed_processes_left_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COREMERGE_CACHE", str(tmp_path))
    old, fresh = tmp_path / ".1.partial", tmp_path / ".2.partial"
    for left in (old, fresh):
        left.touch()
    os.utime(old, (1, 1))
    assert STALE > 3600
    with partial_file() as mine:
        mine.touch()
        assert sorted(tmp_path.glob(".*.partial")) == sorted([fresh, mine])
    assert list(tmp_path.glob(".*.partial")) == [fresh]


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COREMERGE_CACHE", str(tmp_path / "new"))
    inside, overlaps = [], []

    def work() -> None:
        with alone(tmp_path / "a"):
            inside.append(1)
            overlaps.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert overlaps == [1, 1, 1, 1]
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
