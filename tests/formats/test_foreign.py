"""Where PEFT's files are not: what is there is named, and the remedy works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import load
from coremerge.errors import CoremergeError, SourceError, TensorError, UnsupportedError
from coremerge.formats.base_model import sliced
from coremerge.formats.foreign import DEEPEST, adapters_below
from tiny import make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refused(source: Path, **options: Any) -> CoremergeError:
    with pytest.raises(CoremergeError) as error:
        load(source, **options)
    assert error.value.remedy
    return error.value


def last_word(error: CoremergeError) -> str:
    assert error.remedy
    return error.remedy.split(": ")[-1]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapters.safetensors", "0000100_adapters.safetensors", "lora.safetensors"]
)
def test_factors_under_another_name_are_named(tmp_path: Path, name: str) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / name)
    error = refused(folder)
    assert error.what.endswith(f"but LoRA factors in {name}") and len(load(last_word(error))) == 4


def test_of_numbered_ones_the_last_is_named(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    for step in (100, 900):
        save_file(load_file(folder / WEIGHTS), folder / f"{step:07d}_adapters.safetensors")
    (folder / WEIGHTS).unlink()
    assert last_word(refused(folder)).endswith("0000900_adapters.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "adapter_model.pt", "lora.ckpt"])
def test_a_pickle_under_another_name_is_named_and_read_when_asked_for(tmp_path: Path, name: str) -> None:
    folder = make_adapter(tmp_path / "a")
    torch.save(load_file(folder / WEIGHTS), folder / name)
    torch.save({}, folder / "optimizer.bin")
    (folder / WEIGHTS).unlink()
    for options in ({}, {"allow_pickle": True}):
        error = refused(folder, **options)
        assert f"but a pickle: {name}" in error.what and "optimizer" not in str(error)
    assert len(load(last_word(error), allow_pickle=True)) == 4
    with pytest.raises(SourceError, match="this is a pickle"):
        load(folder / name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "torch's distributed checkpoint.*accelerate merge-weights"),
        ("__0_0.distcp", "torch's distributed checkpoint"),
        ("global_step10/mp_rank_00_model_states.pt", "DeepSpeed's own checkpoint.*zero_to_fp32"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed's own checkpoint"),
        ("adapter-f16.gguf", "converted for llama.cpp.*converted from"),
        ("adapters.npz", "an early MLX"),
        (
            "checkpoint-20/adapter_config.json",
            "adapters in subfolders: checkpoint-20. Name one of them: .*checkpoint-20",
        ),
    ],
)
def test_what_else_lies_there_is_named(tmp_path: Path, name: str, what: str) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    assert re.search(what, str(refused(folder)))


def test_a_config_without_anything_says_what_it_always_said(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    assert "Download or save the adapter again; if it only exists as adapter_model.bin" in str(refused(folder))
    assert "adapter_model.bin" not in str(refused(folder, allow_pickle=True))


def test_factors_without_a_config_are_named(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    assert f"but LoRA factors in {WEIGHTS}" in refused(folder).what


@pytest.mark.parametrize("depth", range(1, DEEPEST + 1))
def test_a_run_folder_names_the_checkpoints_that_hold_adapters(tmp_path: Path, depth: int) -> None:
    inner = "/".join(["actor"] * (depth - 1))
    for step in (100, 20):
        make_adapter(tmp_path / "run" / f"global_step_{step}" / inner)
    hollow = make_adapter(tmp_path / "run" / "global_step_3" / inner)
    (hollow / WEIGHTS).unlink()
    error = refused(tmp_path / "run")
    assert [part.split("/")[0] for part in error.what.partition("subfolders: ")[2].split(", ")] == [
        "global_step_20", "global_step_100",
    ]  # fmt: skip
    assert len(load(last_word(error))) == 4


def test_folders_are_not_searched_for_ever(tmp_path: Path) -> None:
    make_adapter(tmp_path / "/".join(["deep"] * (DEEPEST + 1)))
    make_adapter(tmp_path / ".hidden")
    (tmp_path / "round").symlink_to(tmp_path)
    assert adapters_below(tmp_path) == []


def mlx(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, out in (("q_proj", 6), ("v_proj", 3)):
        name = f"model.layers.0.self_attn.{part}"
        tensors[f"{name}.lora_a"] = torch.randn(5, 2, generator=generator)
        tensors[f"{name}.lora_b"] = torch.randn(2, out, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps(config))
    return tensors


MLX = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0}}


@pytest.mark.parametrize("config", [MLX, {"peft_type": "LORA", "r": 2, "lora_alpha": 40}], ids=["its own", "PEFT's"])
@pytest.mark.parametrize("named", ["", "adapters.safetensors"])
def test_mlx_is_told_by_its_keys(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    mlx(tmp_path / "a", config)
    with pytest.raises(
        UnsupportedError, match=r"adapters.safetensors: an adapter of MLX.*lora_a transposed.*lora_alpha"
    ):
        load(tmp_path / "a" / named)


def test_an_mlx_adapter_that_is_converted_as_told_is_right(tmp_path: Path) -> None:
    tensors = mlx(tmp_path / "a", MLX)
    rank, scale = MLX["lora_parameters"]["rank"], MLX["lora_parameters"]["scale"]  # type: ignore[index]
    converted = {
        f"base_model.model.{key[:-1]}{key[-1].upper()}.weight": tensor.T.contiguous() for key, tensor in tensors.items()
    }
    folder = tmp_path / "b"
    folder.mkdir()
    save_file(converted, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}))
    for name, update in load(folder).items():
        right = scale * (tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double()).T
        torch.testing.assert_close(update.dense(), right)


@pytest.mark.parametrize(
    ("name", "what"),
    [("trainer_state.json", "this is JSON"), ("a.gguf", "converted for llama.cpp"), ("adapters.npz", "of numpy's"),
     ("README.md", "no file of tensors"), ("weights", "no file of tensors")],
)  # fmt: skip
@pytest.mark.parametrize("allow_pickle", [True, False])
def test_what_is_no_pickle_is_not_called_one(tmp_path: Path, name: str, what: str, allow_pickle: bool) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / name).write_bytes(b"{}")
    error = refused(folder / name, allow_pickle=allow_pickle)
    assert what in error.what and "this is a pickle" not in str(error)


def test_a_file_of_no_tensors_is_told_before_its_neighbours_are_missed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("rank 16")
    with pytest.raises(SourceError, match="no file of tensors"):
        load(tmp_path / "notes.txt")


Cut = Callable[[torch.Tensor], torch.Tensor]
A_ROWS: dict[str, tuple[Cut, Cut]] = {
    "half of both, by rows": (lambda a: a[: len(a) // 2], lambda b: b[: len(b) // 2]),
    "half of A's rows": (lambda a: a[: len(a) // 2], lambda b: b),
    "a third of A's rows, rounded up": (lambda a: a[:2], lambda b: b),
    "half of B's columns": (lambda a: a, lambda b: b[:, : b.shape[1] // 2].contiguous()),
    "flat": (lambda a: a.flatten(), lambda b: b.flatten()),
    "nothing": (lambda a: a[:0], lambda b: b[:0]),
}


@pytest.mark.parametrize("how", A_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slice_of_one_process_is_told_as_a_shard(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    folder = make_adapter(tmp_path / "a", dtype=dtype)
    cut_a, cut_b = A_ROWS[how]
    tensors = load_file(folder / WEIGHTS)
    sliced = {key: (cut_a if "lora_A" in key else cut_b)(tensor).clone() for key, tensor in tensors.items()}
    save_file(sliced, folder / WEIGHTS)
    with pytest.raises(TensorError, match=r"saved in shards .*gather them, then save again"):
        load(folder)


LLAMA = {
    "self_attn.q_proj": (16, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.down_proj": (16, 24),
}
BERT = {"attention.self.query": (16, 16), "attention.output.dense": (16, 16), "output.dense": (16, 64)}


@pytest.mark.parametrize("block", [LLAMA, BERT], ids=["llama", "bert"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_slice_of_b_alone_is_warned_of(tmp_path: Path, block: dict[str, tuple[int, int]], world: int) -> None:
    tensors = {}
    for layer in range(2):
        for part, (out, inner) in block.items():
            name = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.ones(4, inner)
            tensors[f"{name}.lora_B.weight"] = torch.ones(out // world, 4)
    save_file(tensors, make_adapter(tmp_path / "a") / WEIGHTS)
    warned = load(tmp_path / "a").info.warnings
    assert len(warned) == (world > 1)
    assert all(
        f"read 16 values and write {16 // world}: each B seems to be one process's shard" in one for one in warned
    )


@pytest.mark.parametrize(
    "shapes",
    [
        {"l.0.q_proj": (8, 16), "l.0.k_proj": (8, 16)},  # nothing that writes
        {"l.0.q_proj": (16, 16), "l.0.k_proj": (16, 32), "l.0.o_proj": (16, 16)},  # attention across two streams
        {"l.0.q_proj": (16, 16), "l.0.o_proj": (8, 16), "l.1.q_proj": (8, 8), "l.1.o_proj": (8, 8)},  # a pyramid
        {"l.0.q_proj": (16, 16), "l.0.o_proj": (12, 16)},  # no whole part
        {"q_proj": (16, 16), "o_proj": (8, 16)},  # no blocks
    ],
)
def test_blocks_that_are_made_otherwise_are_not(shapes: dict[str, tuple[int, int]]) -> None:
    assert sliced(shapes) == []


@pytest.mark.parametrize("name", ["weights", "lora.model"])
def test_a_pickle_of_any_name_is_read_when_asked_for(tmp_path: Path, name: str) -> None:
    folder = make_adapter(tmp_path / "a")
    torch.save(load_file(folder / WEIGHTS), folder / name)
    assert "this is a pickle" in refused(folder / name).what
    assert len(load(folder / name, allow_pickle=True)) == 4
