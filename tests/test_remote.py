"""A merge whose parts are done by other processes gives the same bytes: here they are sent and done in this one."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import Recipe, remote
from coremerge.errors import ConfigError, CoremergeError, MismatchError, OutputError, SourceError
from coremerge.pipeline import merge_files, prepare
from coremerge.remote import opened, order_of, write_shard
from posted import Posted
from tiny import make_adapter, make_base

FILE = "adapter_model.safetensors"


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    types = (torch.float32, torch.float16, torch.bfloat16)
    return [
        make_adapter(tmp_path / name, r, seed=seed, layers=3, dtype=dtype)
        for seed, (name, r, dtype) in enumerate(zip("ABC", (4, 6, 2), types, strict=True))
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(dtype="bfloat16", rank=5),
        Recipe(method="ties", space="full", scale=0.5),
        Recipe(method="sum", steps=["balance", "truncate:rank=3"], weights={"A": 0.5}),
    ],
)
def test_the_bytes_are_those_of_one_process(sources: list[Path], tmp_path: Path, recipe: Recipe) -> None:
    merge_files(sources, tmp_path / "here", recipe)
    told: list[tuple[str, int, int]] = []
    merged = merge_files(
        sources, tmp_path / "there", recipe, executor=Posted(), progress=lambda *stage: told.append(stage)
    )
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert ("merging", 6, 6) in told and ("writing", 6, 6) in told
    assert merged.report.modules.keys() == merged.plan.modules.keys()


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_is_written_file_by_file(sources: list[Path], tmp_path: Path, resume: bool) -> None:
    base = sharded(make_base(tmp_path / "base", 3))
    merge_files(sources, tmp_path / "here", into=base)
    merge_files(sources, tmp_path / "there", into=base, executor=Posted(), resume=resume)
    assert len(files(tmp_path / "there")) == 3 and files(tmp_path / "here") == files(tmp_path / "there")


def sharded(base: Path) -> Path:
    """One file a layer."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    home = {key: f"model-{key.split('.')[2]}.safetensors" for key in tensors}
    for name in set(home.values()):
        save_file({k: t for k, t in tensors.items() if home[k] == name}, base / name, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return base


def test_what_a_worker_needs_is_small(sources: list[Path], tmp_path: Path) -> None:
    posted = Posted()
    merge_files(sources, tmp_path / "out", Recipe(), executor=posted)
    assert max(posted.sent) < 20_000  # names, and the cores of one module
    assert len(pickle.dumps(order_of(prepare(sources, Recipe()), "cpu"))) < 5_000


def test_relative_names_are_sent_in_full(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    order = order_of(prepare(["A", "./B"], Recipe(weights={"./B": 2.0}), base="A/adapter_config.json"), "cpu")
    assert order.given.sources == (str(tmp_path / "A"), str(tmp_path / "B"))
    assert order.given.base == str(tmp_path / "A" / "adapter_config.json")
    monkeypatch.chdir("/")
    assert opened(order).plan.weights["B"] != opened(order).plan.weights["A"] and opened(order) is opened(order)


def test_an_id_of_the_hub_is_sent_with_its_commit() -> None:
    assert remote._fixed("org/name", "abc") == "org/name@abc"
    assert remote._fixed("org/name@main:math", "abc") == "org/name@abc:math"
    assert remote._fixed("org/name", None) == "org/name"


@pytest.mark.parametrize("change", ["longer", "other"])
def test_other_files_under_the_same_name_are_refused(sources: list[Path], change: str) -> None:
    order = order_of(prepare(sources, Recipe()), "cpu")
    shutil.rmtree(sources[1])
    make_adapter(sources[1], 6, seed=9, layers=3, dtype=torch.float32 if change == "longer" else torch.float16)
    with pytest.raises(MismatchError, match="other content on"):
        opened(order)
    shutil.rmtree(sources[1])
    with pytest.raises(SourceError, match="no such file"):
        opened(order)


def test_another_base_under_the_same_name_is_refused(sources: list[Path], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", 3)
    order = order_of(prepare(sources, Recipe(), into=base), "cpu")
    held = load_file(base / "model.safetensors")
    save_file({k: t + 1 for k, t in held.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="other content on"):
        opened(order)


def test_another_version_is_refused(sources: list[Path]) -> None:
    order = order_of(prepare(sources, Recipe()), "cpu")
    with pytest.raises(ConfigError, match="has coremerge"):
        opened(replace(order, version="0.0.1"))


def test_a_folder_that_a_worker_cannot_see_is_said(sources: list[Path], tmp_path: Path) -> None:
    order = order_of(prepare(sources, Recipe(), into=make_base(tmp_path / "base", 3)), "cpu")
    with pytest.raises(OutputError, match="cannot be seen on"):
        write_shard(order, 1.0, tmp_path / "nowhere", ("model.safetensors", {}))


@pytest.mark.parametrize("error", [CoremergeError("no"), OutputError("no", file="a", key="b", value=[1], remedy="do")])
def test_errors_come_back_as_they_were(error: CoremergeError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
