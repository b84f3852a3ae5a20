"""Settings of a fit, one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.accuracy.fit_settings import Variant, main, variants


def test_each_setting_is_changed_alone_but_for_what_a_fit_was() -> None:
    listed = list(variants())
    assert str(listed[0]) == "the defaults" and len(listed[1].changed) > 1
    assert all(len(one.changed) == 1 for one in listed[2:])
    assert {name for one in variants(["ridge"]) for name in one.changed if one in listed[2:]} == {"ridge"}
    assert str(Variant({"beyond": 0})) == "beyond 0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--tasks", "nothing"], "nothing: cannot be read"), (["--count", "0"], "counted from 1 on")],
)
def test_what_cannot_be_run_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_small_run(tmp_path: Path) -> None:
    main(["--rows", "6", "--count", "2", "--quick", "--only", "beyond", "--results", str(tmp_path)])
    ((section, found),) = json.loads((tmp_path / "results.json").read_text()).items()
    assert section.endswith("minilm-wordnet, 2 adapters")
    assert set(found["numbers"]) == {str(one) for one in variants(["beyond"])}
    assert all(one["mean"] >= 0 and one["seconds"] > 0 for one in found["numbers"].values())
