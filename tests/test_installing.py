"""How to install an extra: as the package itself was installed."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from coremerge import installing
from coremerge.formats.urls import EXTRAS, HTTP, SCHEMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def installed(monkeypatch: pytest.MonkeyPatch, said: str | Exception | None) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            if isinstance(said, Exception):
                raise said
            return said

    monkeypatch.setattr(installing, "distribution", lambda name: Distribution())


def origin(url: str, **info: Any) -> str:
    return json.dumps({"url": url, **info})


@pytest.mark.parametrize("editable", [False, True])
def test_from_a_clone_it_is_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed(monkeypatch, origin(clone.as_uri(), dir_info={"editable": True} if editable else {}))
    words = shlex.split(installing.install("learn"))
    assert words == ["pip", "install", *(["-e"] if editable else []), f"{clone}[learn]"]


def test_from_an_index_it_is_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    assert installing.install("ray") == "pip install 'coremerge[ray]'"


def test_from_a_repository_it_is_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, origin("https://host/coremerge", vcs_info={"vcs": "git", "commit_id": "a"}))
    assert installing.install("s3") == "pip install 'coremerge[s3] @ git+https://host/coremerge'"


def test_the_revision_and_the_folder_are_those_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    vcs = {"vcs": "git", "commit_id": "a", "requested_revision": "v1"}
    installed(monkeypatch, origin("ssh://git@host/x.git", vcs_info=vcs, subdirectory="py"))
    assert installing.install("s3") == "pip install 'coremerge[s3] @ git+ssh://git@host/x.git@v1#subdirectory=py'"


def test_from_an_archive_it_is_the_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, origin("https://host/coremerge-0.1.tar.gz", archive_info={}))
    assert installing.install("http") == "pip install 'coremerge[http] @ https://host/coremerge-0.1.tar.gz'"


@pytest.mark.parametrize("said", ["not json", "[]", origin("file:///gone/clone"), PackageNotFoundError()])
def test_where_nobody_knows_it_is_said_how_in_a_clone(monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    installed(monkeypatch, said)
    assert installing.install("demo") == "pip install '.[demo]' in the clone that it was installed from"


def test_every_extra_that_is_named_is_there() -> None:
    here = Path(__file__).parents[1]
    known = tomllib.loads((here / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(known)
    assert set(SCHEMES) - set(EXTRAS) == {"adl", "hf", "memory"}  # retired; with huggingface_hub; in this process
    assert set(HTTP) <= set(EXTRAS)
