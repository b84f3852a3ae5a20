"""Bases are made once, whole, by one process at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coremerge.bases import cache
from coremerge.bases.cache import fill, place_of
from coremerge.bases.converter import Converter
from coremerge.errors import OutputError, SourceError

SOURCES = [Path("source.bin")]


def write(sources: Sequence[Path], folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


CONVERTER = Converter(name="fake", version=1, write=write, size=7, hub_id="org/fake")


def failing(error: Exception) -> Converter:
    def fails(sources: Sequence[Path], folder: Path) -> None:
        write(sources, folder)
        raise error

    return replace(CONVERTER, write=fails)


def test_the_place_tells_the_source_the_converter_and_who_can_read_it(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(CONVERTER, ["a"])
    assert place.parent == cache_folder / "bases" and place.name.startswith("fake-")
    assert place == place_of(CONVERTER, ["a"])
    assert place != place_of(CONVERTER, ["b"])
    assert place != place_of(replace(CONVERTER, version=2), ["a"])
    monkeypatch.setattr(cache, "version", lambda name: "999.1")
    assert place != place_of(CONVERTER, ["a"])


def test_one_line_is_said_and_only_when_there_is_work(capsys: pytest.CaptureFixture[str]) -> None:
    place = place_of(CONVERTER, ["a"])
    fill(CONVERTER, SOURCES, place, "")
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"Making the base model fake in {place}, once\n")
    fill(failing(ValueError()), SOURCES, place, "")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("odd bytes"), KeyError("x"), IndexError()])
def test_what_cannot_be_read_is_named_and_leaves_nothing(error: Exception) -> None:
    place = place_of(CONVERTER, ["a"])
    with pytest.raises(SourceError, match=r"source\.bin: cannot be converted by fake: .*\. Get it again"):
        fill(failing(error), SOURCES, place, "Get it again")
    assert not place.parent.exists() or not list(place.parent.iterdir())


def test_what_the_disk_refuses_is_no_fault_of_the_source() -> None:
    place = place_of(CONVERTER, ["a"])
    with pytest.raises(OutputError, match="may not be written"):
        fill(failing(PermissionError()), SOURCES, place, "")
    assert not place.exists()


def test_of_many_at_once_one_works() -> None:
    made = []

    def slow(sources: Sequence[Path], folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        write(sources, folder)

    place = place_of(CONVERTER, ["a"])
    workers = [
        threading.Thread(target=fill, args=(replace(CONVERTER, write=slow), SOURCES, place, "")) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(made) == 1
    assert {file.name for file in place.iterdir()} == {"model.safetensors", cache.FILES}


def test_without_locks_the_second_takes_what_the_first_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(CONVERTER, ["a"])

    def late(sources: Sequence[Path], folder: Path) -> None:
        write(sources, folder)
        place.mkdir()
        write(sources, place)
        (place / cache.FILES).write_text("model.safetensors")

    fill(replace(CONVERTER, write=late), SOURCES, place, "")
    assert [file.name for file in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("gone", ["model.safetensors", cache.FILES])
def test_a_base_that_lacks_a_file_is_made_again(gone: str) -> None:
    place = place_of(CONVERTER, ["a"])
    fill(CONVERTER, SOURCES, place, "")
    assert cache.is_whole(place)
    (place / gone).unlink()
    assert not cache.is_whole(place)
    fill(CONVERTER, SOURCES, place, "")
    assert cache.is_whole(place) and (place / "model.safetensors").read_bytes() == b"weights"


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for given in (str(tmp_path / "file"), "~nobody-of-this-name/x"):
        monkeypatch.setenv("COREMERGE_CACHE", given)
        with pytest.raises(OutputError, match=r"no folder for the cache.*Set COREMERGE_CACHE to a folder"):
            fill(CONVERTER, SOURCES, place_of(CONVERTER, ["a"]), "")


def test_what_killed_processes_left_is_removed() -> None:
    place = place_of(CONVERTER, ["a"])
    old, fresh = (place.parent / f".{place.name}.{n}.partial" for n in (1, 2))
    for left in (old, fresh):
        left.mkdir(parents=True)
    os.utime(old, (1, 1))
    fill(CONVERTER, SOURCES, place, "")
    assert sorted(place.parent.iterdir()) == sorted([fresh, place])
