"""Files of CTranslate2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coremerge.bases.ctranslate2 import read_variables
from fake_packages import ctranslate2_file

VARIABLES = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "a/heads": np.int16(4)}


def test_variables_and_their_second_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_file(VARIABLES, {"b/weight": "a/weight"}))
    found = read_variables(path, "WhisperSpec")
    assert set(found) == {"a/weight", "a/heads", "b/weight"}
    assert found["b/weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(found["a/heads"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"version": 5}, "version 6: version 5"), ({"spec": "TransformerSpec"}, "TransformerSpec, not WhisperSpec")],
)
def test_another_kind_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_file(VARIABLES, {}, **settings))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        read_variables(path, "WhisperSpec")


def test_a_file_that_was_cut_is_refused_wherever_that_was(tmp_path: Path) -> None:
    path, data = tmp_path / "model.bin", ctranslate2_file(VARIABLES, {"b/weight": "a/weight"})
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="more is announced"):
            read_variables(path, "WhisperSpec")


def test_a_shape_that_its_bytes_do_not_fill_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "model.bin", bytearray(ctranslate2_file({"a": VARIABLES["a/weight"]}, {}))
    data[data.index(b"\x02\x00\x00\x00\x03")] = 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shape \[4, 3\] in 12 bytes"):
        read_variables(path, "WhisperSpec")
