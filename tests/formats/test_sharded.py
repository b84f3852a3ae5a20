"""An adapter in several files is read whole or not at all, whichever of them is named."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from coremerge import load
from coremerge.errors import ConfigError, SourceError, TensorError
from coremerge.pipeline import merge_files
from tiny import make_adapter

WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"


def split(
    folder: Path,
    *,
    stem: str = "adapter_model",
    count: int = 3,
    first: int = 1,
    index: bool = True,
    suffix: str = "safetensors",
) -> Path:
    """An adapter's tensors in ``count`` files: A and B of a module in different ones."""
    make_adapter(folder, seed=5)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    home = {}
    for at in range(count):
        name = f"{stem}-{at + first:05d}-of-{count:05d}.{suffix}"
        part = dict(list(tensors.items())[at::count])
        home |= dict.fromkeys(part, name)
        torch.save(part, folder / name) if suffix == "bin" else save_file(part, folder / name)
    if index:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def same(found: Path | str, tmp_path: Path, **options: bool) -> None:
    adapter, whole = load(found, **options), load(make_adapter(tmp_path / "whole", seed=5))
    assert adapter.modules == whole.modules and adapter.name == "a"
    assert all(torch.equal(adapter[name].dense(), whole[name].dense()) for name in whole)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_an_index_or_the_folder_is_the_whole(tmp_path: Path, index: bool, first: int) -> None:
    folder = split(tmp_path / "a", index=index, first=first)
    named = [folder, *folder.glob("*-of-*"), *folder.glob(INDEX)]
    assert len(named) == 4 + index
    for one in named:
        same(one, tmp_path)


def test_shards_of_another_name(tmp_path: Path) -> None:
    folder = split(tmp_path / "a", stem="model")
    same(folder / "model-00002-of-00003.safetensors", tmp_path)
    same(folder / "model.safetensors.index.json", tmp_path)


def test_pickled_shards_are_pickles(tmp_path: Path) -> None:
    folder = split(tmp_path / "a", suffix="bin")
    for named in (folder, folder / "adapter_model-00001-of-00003.bin", folder / "adapter_model.bin.index.json"):
        with pytest.raises(SourceError, match=r"adapter_model-00001-of-00003.bin: this is a pickle.*allow_pickle"):
            load(named)
        same(named, tmp_path, allow_pickle=True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("lost", [1, 3])
def test_a_lone_shard_is_refused(tmp_path: Path, index: bool, lost: int) -> None:
    folder = split(tmp_path / "a", index=index)
    name = f"adapter_model-0000{lost}-of-00003.safetensors"
    (folder / name).unlink()
    for named in ("", "adapter_model-00002-of-00003.safetensors"):
        with pytest.raises(SourceError, match=rf"one of 3 shards: {name} is not beside it\. Put all shards"):
            load(folder / named)


def test_one_shard_of_one_is_a_file(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", seed=5)
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00001.safetensors")
    assert len(load(folder / "adapter_model-00001-of-00001.safetensors")) == 4


def test_all_shards_are_in_the_record_and_unchanged_while_in_use(tmp_path: Path) -> None:
    folder = split(tmp_path / "a")
    adapter = load(folder)
    assert [file.name for file in adapter.info.files][1:] == sorted(file.name for file in folder.glob("*of*"))
    merged = merge_files([folder, make_adapter(tmp_path / "b", seed=6)], tmp_path / "out")
    assert len(merged.sha256["a"]) == 4
    (folder / "adapter_model-00003-of-00003.safetensors").touch()
    with pytest.raises(SourceError, match="changed while it was in use"):
        [adapter[name] for name in adapter]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({}, SourceError, "has no weight_map"),
        ([], SourceError, "has no weight_map"),
        ({"x": 3}, SourceError, "has no weight_map"),
        ({"x": "../a.safetensors"}, SourceError, "not the name of a file of tensors"),
        ({"x": "/etc/passwd"}, SourceError, "not the name of a file of tensors"),
        ({"x": "README.md"}, SourceError, "not the name of a file of tensors"),
        ({"x": "gone.safetensors"}, SourceError, "gone.safetensors is not beside it"),
        ({"x": "adapter_model-00001-of-00003.safetensors"}, TensorError, "x: the index says .* none of the shards"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, table: object, error: type[Exception], message: str) -> None:
    folder = split(tmp_path / "a")
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(error, match=message):
        load(folder)


def test_an_index_that_is_no_json_is_not_called_a_pickle(tmp_path: Path) -> None:
    folder = split(tmp_path / "a")
    (folder / INDEX).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(folder / INDEX)


def test_a_shard_that_its_index_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = split(tmp_path / "a")
    (folder / "adapter_model-00001-of-00002.safetensors").write_bytes(b"of another save")
    with pytest.raises(SourceError, match=r"not one of the shards that adapter_model.safetensors.index.json lists"):
        load(folder / "adapter_model-00001-of-00002.safetensors")


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = split(tmp_path / "a", index=False)
    first = folder / "adapter_model-00001-of-00003.safetensors"
    save_file(load_file(first) | load_file(folder / "adapter_model-00002-of-00003.safetensors"), first)
    with pytest.raises(TensorError, match=r"is in adapter_model-00001-of-00003.safetensors, too"):
        load(folder)


def test_what_transformers_splits_is_read(tmp_path: Path) -> None:
    """The real writer: ``transformers`` saves a model's adapter, in shards where it is large."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    model = transformers.LlamaForCausalLM(config)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size=600)
    assert len(list((tmp_path / "split").glob("adapter_model-*.safetensors"))) > 1
    whole, found = load(tmp_path / "whole"), load(tmp_path / "split")
    assert len(whole) == 4 and found.modules == whole.modules
    assert all(torch.equal(found[name].dense(), whole[name].dense()) for name in whole)
