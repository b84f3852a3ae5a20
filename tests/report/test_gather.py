"""The inputs of a merge, read again for its report: with what the merge could read them with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import load
from coremerge.pipeline import merge_files
from coremerge.report.gather import gather
from coremerge.report.record import FILE, read_record
from tiny import make_adapter, make_base, modules

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def vera(folder: Path) -> Path:
    """Without its projections: they are made anew, once the widest input is known."""
    folder.mkdir()
    tensors = {}
    for name, (out, _) in modules().items():
        tensors[f"base_model.model.{name}.vera_lambda_b"] = torch.ones(out)
        tensors[f"base_model.model.{name}.vera_lambda_d"] = torch.ones(4)
    save_file(tensors, folder / WEIGHTS)
    said = {"peft_type": "VERA", "r": 4, "projection_prng_key": 3, "save_projection": False}
    (folder / CONFIG).write_text(json.dumps({**said, "target_modules": ["q_proj", "v_proj"]}))
    return folder


def pickled(folder: Path) -> Path:
    make_adapter(folder, seed=7)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "plain", seed=1)
    make_adapter(tmp_path / "pissa", seed=2, init_lora_weights="pissa")
    make_adapter(tmp_path / "start", seed=3, init_lora_weights="pissa")
    vera(tmp_path / "vera")
    pickled(tmp_path / "old")
    make_base(tmp_path / "base")
    return tmp_path


EVERY = ["plain", "pissa", "vera", "old"]
HOW: dict[str, dict[str, Any]] = {
    "base": {"base": "base"},
    "width": {"vera_width": 24},
    "into": {"into": "base"},
}


@pytest.mark.parametrize("how", HOW)
def test_what_the_merge_could_read_the_report_can(place: Path, how: str) -> None:
    merge_files(EVERY, "OUT", initial={"pissa": "start"}, allow_pickle=True, **HOW[how])
    record = read_record("OUT")
    said = {"base": "base"} if how == "into" else HOW[how]
    read = {entry["name"]: entry["read"] for entry in record["inputs"]}
    assert read == {"plain": {}, "pissa": {"initial": "start"}, "vera": said, "old": {"allow_pickle": True}}
    numbers = gather(Path("OUT"), record)
    assert numbers.missing == () and numbers.alignment is not None
    assert numbers.alignment.names == tuple(EVERY)


GONE: dict[str, Callable[[], object]] = {
    "plain": lambda: shutil.rmtree("plain"),
    "pissa": lambda: shutil.rmtree("start"),
    "vera": lambda: shutil.rmtree("base"),
    "old": lambda: Path("old", PICKLE).write_bytes(b"other"),
}


@pytest.mark.parametrize("name", GONE)
def test_an_adapter_that_cannot_be_read_costs_only_its_own_rows(place: Path, name: str) -> None:
    merge_files(EVERY, "OUT", initial={"pissa": "start"}, allow_pickle=True, base="base")
    whole = gather(Path("OUT"), read_record("OUT"))
    GONE[name]()
    numbers = gather(Path("OUT"), read_record("OUT"))
    (said,) = numbers.missing
    assert said.startswith(name)
    others = tuple(other for other in EVERY if other != name)
    assert numbers.alignment is not None and numbers.alignment.names == others
    assert numbers.kept == {other: whole.kept[other] for other in others}
    assert all({*others, "merged"} == set(lines) for lines in numbers.spectra.values())


def test_a_pickle_that_the_merge_did_not_read_is_never_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_files(["plain", "old"], "OUT", allow_pickle=True)
    shutil.copy(Path("old", PICKLE), "kept")
    torch.save({"x": torch.ones(1)}, Path("old", PICKLE))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("torch.load", opened)
    assert gather(Path("OUT"), read_record("OUT")).missing == (f"old has changed since the merge: {PICKLE}",)
    shutil.copy("kept", Path("old", PICKLE))
    assert "unpickled" in gather(Path("OUT"), read_record("OUT")).missing[0]


def test_a_record_from_before_it_held_that_is_read_as_it_was(place: Path) -> None:
    merge_files(["plain", "vera"], "OUT", vera_width=24)
    record = read_record("OUT")
    for entry in record["inputs"]:
        del entry["read"]
    Path("OUT", FILE).write_text(json.dumps(record))
    numbers = gather(Path("OUT"), read_record("OUT"))
    assert len(numbers.missing) == 1 and "vera cannot be read" in numbers.missing[0]
    assert load("OUT").modules.keys() == numbers.kept["plain"].keys()
