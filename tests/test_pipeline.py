"""merge_files: from files to a file, in one call."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import Recipe, load
from coremerge.errors import InputError, OutputError, SourceError
from coremerge.pipeline import merge_files, prepare
from tiny import make_adapter


@pytest.fixture
def sources(tmp_path):
    return [make_adapter(tmp_path / name, rank, seed=rank) for name, rank in (("A", 4), ("B", 6))]


def test_merges_and_tells_what_it_did(sources, tmp_path):
    told = []
    recipe = Recipe(method="sum", scale=1.0)
    merged = merge_files(sources, tmp_path / "OUT", recipe, threads=1, progress=lambda *part: told.append(part))
    for name, update in load(tmp_path / "OUT").items():
        expected = load(sources[0])[name].dense() + load(sources[1])[name].dense()
        torch.testing.assert_close(update.dense(), expected, rtol=1e-4, atol=1e-4)  # written in float32
    assert [part for part in told if part[0] == "reading"] == [("reading", 0, 2), ("reading", 1, 2)]
    assert told[-1] == ("writing", 4, 4) and ("merging", 4, 4) in told
    assert merged.report.rank == merged.saved.rank == 10
    assert merged.sha256.keys() == {"A", "B"}
    assert merged.to_dict()["output"]["path"] == str(tmp_path / "OUT")
    assert "Made with" not in (tmp_path / "OUT" / "README.md").read_text()


def test_the_bytes_do_not_depend_on_threads(sources, tmp_path):
    for threads in (1, 2):
        merge_files(sources, tmp_path / str(threads), threads=threads)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "12"]
    assert files[0] == files[1]


def test_preparing_touches_nothing(sources, tmp_path):
    before = sorted(tmp_path.iterdir())
    prepared = prepare(sources, out=tmp_path / "OUT")
    assert prepared.plan.rank == 10
    assert prepared.output_bytes == prepared.plan.output_bytes
    assert sorted(tmp_path.iterdir()) == before


SPELLINGS = [
    {"steps": ["isotropize:span=no"]},
    {"steps": ["isotropize:span=0"], "method": "sum"},
    {"steps": [{"isotropize": {"span": "off"}}], "method": "sum", "space": "knots"},
    {"method": "tsv", "parameters": {"rank": "4.0", "pad": "yes"}},
    {"method": "tsv", "parameters": {"rank": "None"}},
    {},
]


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("values", SPELLINGS, ids=str)
def test_what_is_told_beforehand_is_what_is_written(sources, tmp_path, values, space):
    recipe = Recipe(**{"space": space, **values})
    prepared = prepare(sources, recipe)
    saved = prepared.run(tmp_path / "OUT").saved
    assert saved.rank == prepared.plan.rank
    assert prepared.output_bytes <= saved.bytes < prepared.output_bytes + 2000  # the file's header
    said = (tmp_path / "OUT" / "README.md").read_text() + (tmp_path / "OUT" / "coremerge.json").read_text()
    assert not any(word in said for word in ("None directions", '"4.0"', '"None"', '"yes"', '"off"', "span=0", "=no"))


def test_an_output_is_checked_first(sources):
    with pytest.raises(OutputError, match="exists"):
        merge_files(["nowhere"], sources[0])


def test_nothing_to_merge(tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        merge_files([], tmp_path / "OUT")


def test_into_a_base_with_whole_tensors_and_biases(tmp_path):
    from tiny import make_base

    name = "model.layers.0.self_attn.q_proj"
    base = make_base(tmp_path / "base")
    extra = {f"{name}.lora_B.bias": torch.ones(24)}
    source = make_adapter(tmp_path / "A", extra=extra, lora_bias=True)
    with pytest.raises(InputError, match="bias"):  # the base has no bias there to add it to
        merge_files([source], tmp_path / "OUT", into=base)


def test_whole_tensors_go_into_the_base(tmp_path):
    from tiny import make_base

    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(2, 24)}, base / "model.safetensors", metadata={"format": "pt"})
    source = make_adapter(tmp_path / "A", extra={"score.weight": torch.ones(2, 24)}, modules_to_save=["score"])
    merge_files([source], tmp_path / "OUT", into=base)
    assert (load_file(tmp_path / "OUT" / "model.safetensors")["score.weight"] == 1).all()


def change(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        os.truncate(path, path.stat().st_size - 8)
    else:
        path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("stage", ["merging", "writing"])
@pytest.mark.parametrize("how", ["gone", "cut short", "other"])
def test_an_input_that_changes_midway_is_noticed(sources, tmp_path, how, stage, resume):
    path = sources[1] / "adapter_model.safetensors"
    kept = path.read_bytes()

    def meddle(label, done, count):
        if (label, done) == (stage, 1):
            change(path, how)

    with pytest.raises(SourceError, match=r"B/adapter_model.safetensors: (changed|cannot be read)"):
        merge_files(sources, tmp_path / "OUT", threads=1, batch=1, progress=meddle, resume=resume)
    assert {file.name for file in tmp_path.iterdir()} == {"A", "B", *([".OUT.resume"] if resume else [])}
    path.write_bytes(kept)
    merge_files(sources, tmp_path / "OUT", threads=1, batch=1, resume=resume)
    merge_files(sources, tmp_path / "WHOLE", threads=1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "OUT" / name).read_bytes() == (tmp_path / "WHOLE" / name).read_bytes()


def test_a_config_that_changes_after_planning_is_noticed(sources, tmp_path):
    prepared = prepare(sources, out=tmp_path / "OUT")
    config = sources[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9 '))
    with pytest.raises(SourceError, match=r"adapter_config.json: changed while it was in use"):
        prepared.run(tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_an_initial_adapter_that_changes_is_noticed(sources, tmp_path):
    trained = make_adapter(tmp_path / "T", 4, seed=9, init_lora_weights="pissa")
    prepared = prepare([trained], initial={"T": sources[0]})
    change(sources[0] / "adapter_model.safetensors", "cut short")
    with pytest.raises(SourceError, match=r"A/adapter_model.safetensors: changed"):
        prepared.run(tmp_path / "OUT")


def test_a_base_that_is_replaced_after_planning_is_noticed(sources, tmp_path):
    from tiny import make_base

    base = make_base(tmp_path / "base")
    prepared = prepare(sources, into=base)
    tensors = load_file(base / "model.safetensors")
    save_file({key: -tensor for key, tensor in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"base/model.safetensors: changed while it was in use"):
        prepared.run(tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
