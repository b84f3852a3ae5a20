"""VeRA and PVeRA: with their projections, and with A and B made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from coremerge import load
from coremerge.errors import ConfigError, CoremergeError, SourceError, TensorError


class Block(nn.Module):
    """A transformer block's linear layers, of different widths, one of them GPT-2's."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.q_proj = nn.Linear(8, 6, bias=False)
        self.o_proj = nn.Linear(6, 8, bias=False)
        self.up_proj = nn.Linear(8, 14, bias=False)
        self.down_proj = nn.Linear(14, 8, bias=False)
        self.c_attn = Conv1D(9, 8)


def base(folder: Path, model: nn.Module, prefix: str = "", **config: Any) -> Path:
    folder.mkdir()
    state = {prefix + key: value.float().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(model: Any, adapter: Any, rank: int) -> None:
    layers = [name for name, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")]
    assert sorted(layers) == list(adapter)
    for name in layers:
        theirs = zoo.delta(model, name)
        assert adapter.modules[name].rank == adapter[name].rank == rank
        assert adapter.modules[name].shape == adapter[name].shape == tuple(theirs.shape)
        # both in float64, in another order
        torch.testing.assert_close(adapter[name].dense(), theirs, rtol=1e-12, atol=1e-12)


KINDS = [(peft.VeraConfig, True), (peft.VeraConfig, False), (peft.PveraConfig, True), (peft.PveraConfig, False)]


@pytest.mark.parametrize(("kind", "saved"), KINDS)
def test_modules_of_one_width_need_no_base(tmp_path: Path, kind: Any, saved: bool) -> None:
    model = zoo.adapted(zoo.quietly(kind, r=5, target_modules=["q_proj", "up_proj"], save_projection=saved), Block())
    folder = zoo.save(model, tmp_path / "a")
    adapter = load(folder, vera_width=None if saved else 8)
    check(model, adapter, 5)
    assert any("taken to have 8 inputs" in note for note in adapter.info.notes)
    assert any("made anew from projection_prng_key 0, 8 wide" in note for note in adapter.info.notes) != saved


@pytest.mark.parametrize(("kind", "saved"), KINDS)
@pytest.mark.parametrize("prefix", ["", "model.", "base."])
def test_slices_by_the_base_models_own_shapes(tmp_path: Path, kind: Any, saved: bool, prefix: str) -> None:
    targets = ["q_proj", "o_proj", "up_proj", "down_proj", "c_attn"]
    torch.manual_seed(1)
    block = Block()
    folder = base(tmp_path / "base", block, prefix)
    config = zoo.quietly(
        kind, r=5, target_modules=targets, save_projection=saved, projection_prng_key=17, fan_in_fan_out=False
    )
    model = zoo.adapted(config, block)
    adapter = load(zoo.save(model, tmp_path / "a"), base=folder)
    check(model, adapter, 5)
    assert not any("taken to have" in note for note in adapter.info.notes)


@pytest.mark.parametrize("given", ["config.json", ""])
def test_widths_from_the_base_config_and_the_names(tmp_path: Path, given: str) -> None:
    config = {"text_config": {"hidden_size": 8, "intermediate_size": 14, "num_attention_heads": 3, "head_dim": 2}}
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    model = zoo.adapted(zoo.quietly(peft.VeraConfig, r=4, target_modules=targets, save_projection=False), Block())
    check(model, load(zoo.save(model, tmp_path / "a"), base=folder / given), 4)


def test_widths_from_a_hub_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 8, "n_inner": None}))
    listed = dict.fromkeys(("config.json", "sub/config.json"), tmp_path / "config.json")
    cache = zoo.hub_cache(tmp_path / "hub", "org/base", listed)
    model = zoo.adapted(
        zoo.quietly(peft.VeraConfig, r=4, target_modules=["q_proj", "up_proj"], save_projection=False), Block()
    )
    for name in ("org/base", "org/base:sub"):
        check(model, load(zoo.save(model, tmp_path / "a"), base=name, cache_dir=cache), 4)


def test_fan_in_fan_out_is_read(tmp_path: Path) -> None:
    model = zoo.adapted(zoo.quietly(peft.VeraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True), Block())
    adapter = load(zoo.save(model, tmp_path / "a"))
    check(model, adapter, 4)
    assert adapter.info.fan_in_fan_out and adapter.info.type == "VERA"


def test_adapters_of_one_key_share_a(tmp_path: Path) -> None:
    """λ_d scales the rows of one A: the stacked A of several adapters has rank r."""
    both = []
    for seed in (1, 2):
        model = zoo.adapted(zoo.quietly(peft.VeraConfig, r=3, target_modules=["q_proj"]), Block(), seed=seed)
        both.append(load(zoo.save(model, tmp_path / str(seed)))["q_proj"].right)
    assert torch.linalg.matrix_rank(torch.cat(both)) == 3


def by_hand(folder: Path, change: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
    tensors: dict[str, torch.Tensor] = {
        "base_model.vera_A": torch.ones(2, 4),
        "base_model.vera_B": torch.ones(5, 2),
        "base_model.model.x.vera_lambda_b": torch.ones(5),
        "base_model.model.x.vera_lambda_d": torch.ones(2),
    }
    for key, value in (change or {}).items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return zoo.by_hand(folder, tensors, **{"peft_type": "VeRA", "r": 2, **config})


def test_another_exporters_config(tmp_path: Path) -> None:
    adapter = load(by_hand(tmp_path / "a", lora_alpha=16))
    assert adapter["x"].dense().eq(2).all()
    assert any("lora_alpha" in note for note in adapter.info.notes)
    gone: dict[str, torch.Tensor | None] = {"base_model.vera_A": None, "base_model.vera_B": None}
    with pytest.raises(ConfigError, match=r"projection_prng_key = null: missing: this config is not PEFT's"):
        load(by_hand(tmp_path / "b", gone, lora_alpha=16), vera_width=4)


def test_sampling_at_inference_is_noted(tmp_path: Path) -> None:
    config = zoo.quietly(peft.PveraConfig, r=3, target_modules=["q_proj"], sample_at_inference=True)
    notes = load(zoo.save(zoo.adapted(config, Block()), tmp_path / "a")).info.notes
    assert any("its mean is taken" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"base_model.vera_A": None}, {}, r"safetensors: base_model.vera_B: only one of vera_A and vera_B"),
        (
            {"base_model.vera_A": None, "base_model.vera_B": None},
            {},
            r"config.json: save_projection = null: .*vera_width",
        ),
        (
            {"base_model.vera_A": torch.ones(3, 4)},
            {},
            r"base_model.vera_A: A \[3, 4\] and B \[5, 2\] do not fit rank 2",
        ),
        ({"base_model.vera_B": torch.ones(4, 2)}, {}, r"base_model.vera_B: B has 4 rows, and a module has 5 outputs"),
        ({"base_model.vera_B": torch.ones(5, 2).to(torch.int8)}, {}, r"base_model.vera_B: stored as I8"),
        ({}, {"r": 3}, r"config.json: r = 3: x has a λ_d of 2 values in the file, and the config says 3"),
        ({"base_model.model.x.vera_lambda_d": None}, {}, r"x\.vera_lambda_b: x has no vera_lambda_d"),
        ({"base_model.model.x.vera_lambda_b": torch.ones(5, 1)}, {}, r"shape \[5, 1\] is not that of a vector"),
        ({"base_model.model.y.weight": torch.ones(5, 1)}, {}, r"y\.weight: nothing reads"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, torch.Tensor | None], config: dict[str, Any], message: str) -> None:
    with pytest.raises(CoremergeError, match=message):
        load(by_hand(tmp_path / "a", change, **config))


@pytest.mark.parametrize("key", [True, "seven", 1.5, 2**70])
def test_a_key_that_is_no_seed(tmp_path: Path, key: object) -> None:
    gone: dict[str, torch.Tensor | None] = {"base_model.vera_A": None, "base_model.vera_B": None}
    with pytest.raises(ConfigError, match=r"projection_prng_key = .*must be a whole number"):
        load(by_hand(tmp_path / "a", gone, projection_prng_key=key), vera_width=4)


def test_no_module(tmp_path: Path) -> None:
    gone: dict[str, torch.Tensor | None] = {f"base_model.model.x.vera_lambda_{part}": None for part in "bd"}
    with pytest.raises(TensorError, match="no VERA module"):
        load(by_hand(tmp_path / "a", gone))


def test_nan_in_the_shared_a(tmp_path: Path) -> None:
    adapter = load(by_hand(tmp_path / "a", {"base_model.vera_A": torch.full((2, 4), torch.nan)}))
    with pytest.raises(TensorError, match=r"base_model\.vera_A: 8 of 8 values are NaN"):
        adapter["x"]


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], ["q_proj", "o_proj"]])
def test_modules_of_several_widths_need_a_base(tmp_path: Path, targets: list[str]) -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = nn.Linear(10, 8, bias=False)  # wider inside than outside

    model = zoo.adapted(zoo.quietly(peft.VeraConfig, r=4, target_modules=targets), Wide())
    with pytest.raises(ConfigError, match=r"config.json: target_modules = .*which a VeRA file does not tell.*base="):
        load(zoo.save(model, tmp_path / "a"))


class TestWrongBase:
    """A base that does not fit is refused, with its own file named."""

    def test_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"missing: no such base model"):
            load(by_hand(tmp_path / "a"), base=tmp_path / "missing")

    def test_no_width_in_its_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "x", "hidden_size": true}')
        with pytest.raises(ConfigError, match=r"config.json: hidden_size: the base's config names no width"):
            load(by_hand(tmp_path / "a"), base=tmp_path)

    def test_no_config(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(SourceError, match=r"empty/config.json: cannot be read"):
            load(by_hand(tmp_path / "a"), base=tmp_path / "empty")

    def test_other_modules_or_shapes(self, tmp_path: Path) -> None:
        folder = base(tmp_path / "base", nn.ModuleDict({"x": nn.Linear(4, 6)}))
        with pytest.raises(ConfigError, match=r"base: x\.weight: no weight of x with 5 outputs.*found \[6, 4\]"):
            load(by_hand(tmp_path / "a"), base=folder)
        folder = base(tmp_path / "other", nn.ModuleDict({"z": nn.Linear(4, 6)}))
        with pytest.raises(ConfigError, match=r"x\.weight: no weight of x.*found None"):
            load(by_hand(tmp_path / "b"), base=folder)

    def test_packed_weights_tell_no_widths_and_their_config_does(self, tmp_path: Path) -> None:
        packed = (
            {"x.qweight": torch.zeros(1, 5, dtype=torch.int32)},
            {"x.weight": torch.zeros(10, 1, dtype=torch.uint8)},
        )
        for i, tensors in enumerate(packed):
            folder = base(tmp_path / f"base{i}", nn.Module(), quantization_config={"quant_method": "x"}, hidden_size=4)
            save_file(tensors, folder / "model.safetensors")
            with pytest.raises(ConfigError, match=r"packed and tell no widths: give base=its config\.json"):
                load(by_hand(tmp_path / "a"), base=folder)
            assert load(by_hand(tmp_path / "a"), base=folder / "config.json").modules["x"].shape == (5, 4)

    def test_wider_than_the_shared_a(self, tmp_path: Path) -> None:
        folder = base(tmp_path / "base", nn.ModuleDict({"x": nn.Linear(6, 5)}))
        with pytest.raises(ConfigError, match=r"x has 6 inputs in the base model, and the shared A only 4"):
            load(by_hand(tmp_path / "a"), base=folder)


@pytest.mark.parametrize("width", [10**9, 10**30])
def test_projections_too_large_to_be_made_anew(tmp_path: Path, width: int) -> None:
    stem = "base_model.model.layers.0.q_proj.vera_lambda_"
    folder = zoo.by_hand(tmp_path / "a", {f"{stem}b": torch.ones(8), f"{stem}d": torch.ones(256)}, peft_type="VERA",
                         r=256, projection_prng_key=0, save_projection=False)  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"hidden_size": width}))
    for said in ({"base": tmp_path / "base"}, {"vera_width": width}):
        with pytest.raises(ConfigError, match=rf"save_projection: .*at rank 256 for {width} inputs they are too large"):
            load(folder, **said)
