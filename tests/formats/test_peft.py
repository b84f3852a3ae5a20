"""PEFT's LoRA: what PEFT writes is read with PEFT's own update, for every layer type and setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coremerge import load
from coremerge.errors import ConfigError, CoremergeError, MismatchError, TensorError, UnsupportedError
from coremerge.formats.safetensors_file import EIGHT_BITS
from coremerge.pipeline import merge_files
from coremerge.recipe import Recipe

EVERY = ["q_proj", "k_proj", "c_attn", "embed", "conv1", "conv2", "point", "conv3"]
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "alpha over r": {"r": 4, "lora_alpha": 10},
    "float alpha": {"r": 4, "lora_alpha": 2.5},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        # in sorted order, because PEFT sorts the keys when it saves
        "rank_pattern": {"layers.1.q_proj": 2, r"layers\.\d\.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {"^q_proj": 1.5, "conv[12]": 9},
    },
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 11, "embed": 3},
    },
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
}


def check(model: Any, folder: Path, tolerance: float = 1e-12) -> None:
    """1e-12: both multiply in float64, in another order; more where PEFT multiplies in the stored dtype."""
    adapter = load(folder)
    layers = [name for name, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")]
    assert sorted(layers) == list(adapter)
    for name in layers:
        mine, theirs = adapter[name], zoo.delta(model, name)
        assert mine.dtype == torch.float64
        assert mine.shape == adapter.modules[name].shape == tuple(theirs.shape)
        assert mine.rank == adapter.modules[name].rank
        torch.testing.assert_close(mine.dense(), theirs, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_layer_type_as_peft(tmp_path: Path, setting: str) -> None:
    config = peft.LoraConfig(target_modules=EVERY, **SETTINGS[setting])
    model = zoo.adapted(config)
    check(model, zoo.save(model, tmp_path / "a"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_every_stored_dtype(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = zoo.adapted(peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=3), dtype=dtype)
    folder = zoo.save(model, tmp_path / "a")
    adapter = load(folder)
    assert adapter.dtype == adapter.modules["q_proj"].dtype == dtype
    check(model, folder, tolerance)
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.q_proj.lora_{part}.weight"].double() for part in "AB")
    # sums of three products
    torch.testing.assert_close(adapter["q_proj"].dense(), 8 / 3 * b @ a, rtol=1e-14, atol=1e-14)


def test_kinds_and_kernels(tmp_path: Path) -> None:
    modules = load(zoo.save(zoo.adapted(peft.LoraConfig(target_modules=EVERY)), tmp_path / "a")).modules
    assert {name: (m.kind, m.kernel, m.shape) for name, m in modules.items() if m.kind != "linear"} == {
        "embed": ("embedding", (), (12, 15)),
        "conv1": ("conv1d", (3,), (6, 12)),
        "conv2": ("conv2d", (2, 3), (5, 18)),
        "point": ("conv2d", (1, 1), (5, 3)),
        "conv3": ("conv3d", (2, 2, 2), (4, 16)),
    }
    assert modules["c_attn"].shape == (9, 12)


def test_lora_bias_is_scaled(tmp_path: Path) -> None:
    model = zoo.adapted(peft.LoraConfig(target_modules=["q_proj", "conv2"], r=4, lora_alpha=6, lora_bias=True))
    adapter = load(zoo.save(model, tmp_path / "a"))
    assert {"q_proj", "conv2"} <= set(adapter.biases)
    with torch.no_grad():
        x = torch.zeros(1, 12, dtype=torch.float64)
        layer = model.base_model.model.q_proj
        torch.testing.assert_close((layer(x) - layer.base_layer(x))[0], adapter.biases["q_proj"])
    check(model, tmp_path / "a")


def test_multihead_attention_keeps_pefts_names(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

    config = peft.LoraConfig(target_modules=["mha"], r=4, lora_alpha=6, rank_pattern={"mha": 3})
    model = zoo.adapted(config, Attention())
    adapter = load(zoo.save(model, tmp_path / "a"))
    layer = model.base_model.model.mha
    both = layer.get_delta_weight("default"), layer.base_layer.out_proj.get_delta_weight("default")
    torch.testing.assert_close(adapter["mha"].dense(), both[0].detach())
    torch.testing.assert_close(adapter["mha.base_layer.out_proj"].dense(), both[1].detach())


def test_grouped_convolution_is_refused(tmp_path: Path) -> None:
    folder = zoo.save(zoo.adapted(peft.LoraConfig(target_modules=["grouped"], r=4)), tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"grouped\.lora_B\.weight.*convolution in 2 groups.*target_modules"):
        load(folder)


def test_dora_and_kasa_are_refused_by_config_and_by_tensor(tmp_path: Path) -> None:
    model = zoo.adapted(peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    folder = zoo.save(model, tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"adapter_config.json: use_dora = true: DoRA.*without DoRA"):
        load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(UnsupportedError, match=r"adapter_model.safetensors: .*q_proj.lora_magnitude_vector: DoRA"):
        load(folder)
    folder = zoo.simple(tmp_path / "b", change=lambda t: t.update({"base_model.model.x.lora_diag": torch.ones(2)}))
    with pytest.raises(UnsupportedError, match=r"x\.lora_diag: KaSA"):
        load(folder)


def test_modules_to_save_become_extras(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["k_proj"], modules_to_save=["classifier", "score"])
    model = zoo.adapted(config, dtype=torch.float32)
    adapter = load(zoo.save(model, tmp_path / "a"))
    kept = model.base_model.model.classifier.modules_to_save["default"].state_dict()
    assert set(adapter.extras) == {f"classifier.{name}" for name in kept}
    assert adapter.info.modules_to_save == ("classifier",)
    for name, value in kept.items():
        assert torch.equal(adapter.extras[f"classifier.{name}"], value), name
    assert list(adapter) == ["k_proj"]


def test_trained_token_rows(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed": [3, 1, 7]})
    model = zoo.adapted(config)
    adapter = load(zoo.save(model, tmp_path / "a"))
    rows = model.base_model.model.embed.token_adapter.trainable_tokens_delta["default"]
    assert adapter.info.token_indices == {"embed": (3, 1, 7)}
    assert torch.equal(adapter.extras["embed.token_adapter.trainable_tokens_delta"], rows)


@pytest.mark.parametrize("given", [None, [1], {"other": [1, 2]}, [1, True], {"embed": "all"}])
def test_token_rows_without_their_ids_are_refused(tmp_path: Path, given: object) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"] = torch.ones(2, 4)

    folder = zoo.simple(tmp_path / "a", change=add, trainable_token_indices=given)
    with pytest.raises(ConfigError, match=r"adapter_config.json: trainable_token_indices = .*2 token ids.*embed"):
        load(folder)


def test_base_matrices_of_a_targeted_embedding_are_noted_and_left(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.lm_head.base_layer.weight"] = torch.ones(5, 4)
        tensors["base_model.model.lm_head.base_layer.bias"] = torch.ones(5)

    adapter = load(zoo.simple(tmp_path / "a", change=add))
    assert not adapter.extras
    assert any("lm_head.base_layer.weight" in note for note in adapter.info.notes)


def test_embeddings_saved_unasked_are_carried(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(9, 4)

    adapter = load(zoo.simple(tmp_path / "a", change=add))
    assert adapter.info.modules_to_save == ("embed_tokens",)
    assert torch.equal(adapter.extras["model.embed_tokens.weight"], torch.ones(9, 4))
    assert any("resized vocabulary" in note for note in adapter.info.notes)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_biases_are_refused(tmp_path: Path, bias: str) -> None:
    folder = zoo.save(zoo.adapted(peft.LoraConfig(target_modules=["q_proj"], bias=bias)), tmp_path / "a")
    with pytest.raises(UnsupportedError, match=rf'adapter_config.json: bias = "{bias}": .*\.bias.*bias="none"'):
        load(folder)


def test_bias_setting_without_bias_tensors_is_fine(tmp_path: Path) -> None:
    assert len(load(zoo.simple(tmp_path / "a", bias="all"))) == 2


class TestInitial:
    """PiSSA and its kin: relative to a base that their start changed."""

    def pair(self, tmp_path: Path, **settings: Any) -> tuple[Path, Path, Any, nn.Module]:
        torch.manual_seed(0)
        base = zoo.Zoo()
        before = {name: value.clone() for name, value in base.state_dict().items()}
        config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, lora_alpha=6, **settings)
        model = peft.get_peft_model(base, config)
        zoo.save(model, tmp_path / "start")
        zoo.randomise(model, "lora_")
        zoo.save(model, tmp_path / "trained")
        return tmp_path / "start", tmp_path / "trained", model, before

    @pytest.mark.parametrize(
        "settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora", "use_rslora": True}], ids=str
    )
    def test_subtracting_the_start_is_exact(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        start, trained, model, before = self.pair(tmp_path, **settings)
        with pytest.raises(UnsupportedError, match=r"init_lora_weights = .*changed the base.*initial=") as refused:
            load(trained)
        assert str(trained) in str(refused.value)
        adapter = load(trained, initial=start)
        assert {m.rank for m in adapter.modules.values()} == {8}
        assert any("initial" in note and "rank 4 became 8" in note for note in adapter.info.notes)
        assert {file.parent.name for file in adapter.info.files} == {trained.name, start.name}
        for name in ("q_proj", "k_proj"):
            layer = model.base_model.model.get_submodule(name)
            real = layer.base_layer.weight + layer.get_delta_weight("default") - before[f"{name}.weight"]
            # float32, of size 1
            torch.testing.assert_close(adapter[name].dense(), real.detach().double(), rtol=0, atol=1e-5)
        said = json.loads((start / "adapter_config.json").read_text())
        (start / "adapter_config.json").write_text(json.dumps({**said, "init_lora_weights": True}))
        again = load(trained, initial=load(start))
        assert torch.equal(again["q_proj"].dense(), adapter["q_proj"].dense())

    def test_a_plain_adapter_needs_no_start(self, tmp_path: Path) -> None:
        folder = zoo.simple(tmp_path / "a")
        with pytest.raises(ConfigError, match=r"init_lora_weights = null.*initial.*Leave"):
            load(folder, initial=folder)

    def test_a_start_of_another_adapter_is_refused(self, tmp_path: Path) -> None:
        trained = zoo.simple(tmp_path / "a", init_lora_weights="pissa_niter_4")
        other = zoo.by_hand(tmp_path / "b", zoo.lora("layers.0.q_proj"), r=2)
        with pytest.raises(MismatchError, match=r"b: layers\.0\.v_proj: .*not the same modules"):
            load(trained, initial=other)
        wide = zoo.by_hand(tmp_path / "c", zoo.lora("layers.0.q_proj", "layers.0.v_proj", shape=(5, 6)), r=2)
        with pytest.raises(MismatchError, match=r"c: layers\.0\.q_proj: initial linear \(5, 6\)"):
            load(trained, initial=wide)

    def test_an_unknown_initialisation_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match=r'init_lora_weights = "brandnew": .*write true'):
            load(zoo.simple(tmp_path / "a", init_lora_weights="brandnew"))


class TestKeys:
    """Every key is read or refused; nothing falls through."""

    def test_adapter_name_left_in(self, tmp_path: Path) -> None:
        plain = load(zoo.simple(tmp_path / "a"))

        def rename(tensors: dict[str, Tensor]) -> None:
            for key in list(tensors):
                tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

        named = load(zoo.simple(tmp_path / "b", change=rename))
        assert {k: v.dense().tolist() for k, v in named.items()} == {k: v.dense().tolist() for k, v in plain.items()}
        assert any("'default'" in note for note in named.info.notes)

    def test_no_prefix(self, tmp_path: Path) -> None:
        def rename(tensors: dict[str, Tensor]) -> None:
            for key in list(tensors):
                tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

        adapter = load(zoo.simple(tmp_path / "a", change=rename))
        assert list(adapter) == ["layers.0.q_proj", "layers.0.v_proj"]
        assert any("4 keys without the prefix" in note for note in adapter.info.notes)

    def test_modules_to_save_name_left_in_and_originals(self, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["base_model.model.classifier.modules_to_save.default.dense.weight"] = torch.ones(2, 3)
            tensors["base_model.model.classifier.original_module.dense.weight"] = torch.zeros(2, 3)

        adapter = load(zoo.simple(tmp_path / "a", change=add, modules_to_save=["classifier"]))
        assert {name: value.sum().item() for name, value in adapter.extras.items()} == {"classifier.dense.weight": 6}
        assert any("original_module" in note for note in adapter.info.notes)

    def test_saved_copy_that_the_config_does_not_list(self, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["base_model.model.head.out.modules_to_save.default.weight"] = torch.ones(2, 3)

        adapter = load(zoo.simple(tmp_path / "a", change=add))
        assert list(adapter.extras) == ["head.out.weight"]
        assert adapter.info.modules_to_save == ("head.out",)

    @pytest.mark.parametrize(
        ("setting", "module"),
        [
            ({"task_type": "SEQ_CLS"}, "score"),
            ({"modules_to_save": ["head"]}, "qa_head"),
            ({"modules_to_save": ["pooler.dense"]}, "bert.pooler.dense"),
        ],
    )
    def test_heads_by_task_and_by_pefts_endswith(self, tmp_path: Path, setting: dict[str, Any], module: str) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors[f"base_model.model.{module}.weight"] = torch.ones(2, 3)

        assert list(load(zoo.simple(tmp_path / "a", change=add, **setting)).extras) == [f"{module}.weight"]

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("base_model.model.classifier.weight", r"classifier\.weight: nothing reads .*1 of 5 .*modules_to_save"),
            ("base_model.model.layers.0.q_proj.lora_E", r"lora_E: nothing reads"),
            ("base_model.model.layers.0.q_proj.lora_A.bias", r"lora_A\.bias: nothing reads"),
            ("base_model.model.layers.0.q_proj.lora_C.weight", r"lora_C\.weight: nothing reads"),
            ("base_model.model.lora_A.weight", r"lora_A\.weight: nothing reads"),
            ("base_model.model.norm.bias", r"norm\.bias: trained biases of the base"),
            ("layers.0.q_proj.lora_A.weight", r"two tensors for one place: base_model.*and layers\.0"),
            ("base_model.model.layers.0.x.lora_A.weight", r"x\.lora_A\.weight: layers\.0\.x has no lora_B"),
            ("base_model.model.layers.0.x.lora_B.weight", r"x\.lora_B\.weight: layers\.0\.x has no lora_A"),
            ("base_model.model.layers.0.x.lora_embedding_A", r"layers\.0\.x has no lora_embedding_B"),
        ],
    )
    def test_stray_and_missing_tensors(self, tmp_path: Path, key: str, message: str) -> None:
        folder = zoo.simple(tmp_path / "a", change=lambda t: t.update({key: torch.ones(2, 4)}))
        with pytest.raises(CoremergeError, match=message) as refused:
            load(folder)
        assert "adapter_model.safetensors" in str(refused.value)
        assert refused.value.remedy

    def test_several_adapters_in_one_file(self, tmp_path: Path) -> None:
        tensors = {}
        for name in ("first", "second"):
            for key, value in zoo.lora(f"{name}_layer").items():
                tensors[key.replace(".weight", f".{name}.weight")] = value
        with pytest.raises(TensorError, match="several adapters in one file: first, second"):
            load(zoo.by_hand(tmp_path / "a", tensors, r=2))

    def test_a_linear_layer_that_is_also_an_embedding(self, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors["base_model.model.layers.0.q_proj.lora_embedding_A"] = torch.ones(2, 4)
            tensors["base_model.model.layers.0.q_proj.lora_embedding_B"] = torch.ones(5, 2)

        with pytest.raises(TensorError, match="both a linear layer and an embedding"):
            load(zoo.simple(tmp_path / "a", change=add))

    def test_no_module_at_all(self, tmp_path: Path) -> None:
        folder = zoo.by_hand(tmp_path / "a", {"base_model.model.lm_head.weight": torch.ones(2, 2)}, r=2)
        with pytest.raises(TensorError, match=r"adapter_model.safetensors: no LORA module among its 1 tensors.*target"):
            load(folder)


class TestShapes:
    """Ranks and shapes come from the tensors and must agree with the config."""

    def replaced(self, folder: Path, part: str, value: Tensor) -> Path:
        return zoo.simple(folder, change=lambda t: t.update({f"base_model.model.layers.0.q_proj.lora_{part}": value}))

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("B.weight", torch.ones(5, 3)),
            ("B.weight", torch.ones(5, 2, 1)),
            ("B.weight", torch.ones(10)),
            ("B.weight", torch.ones(5, 0)),
            ("A.weight", torch.ones(2, 0)),
            ("A.weight", torch.ones(())),
        ],
    )
    def test_factors_that_do_not_multiply(self, tmp_path: Path, part: str, value: Tensor) -> None:
        folder = self.replaced(tmp_path / "a", part, value)
        with pytest.raises(TensorError, match=r"q_proj\.lora_B\.weight: A \[.*\] and B \[.*\] do not multiply"):
            load(folder)

    def test_shards_that_were_never_gathered(self, tmp_path: Path) -> None:
        with pytest.raises(TensorError, match="ZeRO-3"):
            load(self.replaced(tmp_path / "a", "B.weight", torch.ones(0)))

    def test_a_bias_of_another_length(self, tmp_path: Path) -> None:
        with pytest.raises(TensorError, match=r"lora_B\.bias: shape \[4\], and the layer has 5 outputs"):
            load(self.replaced(tmp_path / "a", "B.bias", torch.ones(4)))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
    def test_factors_that_are_no_plain_floats(self, tmp_path: Path, dtype: torch.dtype) -> None:
        with pytest.raises(TensorError, match=r"lora_B\.weight: stored as (I8|U8).*BF16"):
            load(self.replaced(tmp_path / "a", "B.weight", torch.ones(5, 2).to(dtype)))

    @pytest.mark.parametrize("dtype", EIGHT_BITS.values())
    def test_8_bit_factors_count_as_bfloat16(self, tmp_path: Path, dtype: torch.dtype) -> None:
        stored = zoo.lora("model.layers.0.q_proj", "model.layers.1.q_proj", dtype=dtype)
        settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
        plain = {key: value.bfloat16() for key, value in stored.items()}
        made, same = (load(zoo.by_hand(tmp_path / n, t, **settings)) for n, t in (("a", stored), ("b", plain)))
        assert made.dtype == torch.bfloat16
        assert any("stored in 8 bits" in note and "bfloat16" in note for note in made.info.notes)
        assert all(torch.equal(made[name].dense(), same[name].dense()) for name in same)
        recipe = Recipe(method="sum", steps=[], scale=1.0)
        for name in "ab":
            merge_files([tmp_path / name], tmp_path / f"out-{name}", recipe)
        outs = [(tmp_path / f"out-{name}/adapter_model.safetensors").read_bytes() for name in "ab"]
        assert outs[0] == outs[1]
        zoo.loaded(tmp_path / "out-a", zoo.Decoder())

    @pytest.mark.parametrize(
        ("other", "joint"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32,) * 2]
    )
    def test_8_bit_factors_beside_others(self, tmp_path: Path, other: torch.dtype, joint: torch.dtype) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for key, value in tensors.items():
                tensors[key] = value.to(torch.float8_e4m3fn if "lora_B" in key else other)

        assert load(zoo.simple(tmp_path / "a", change=change)).dtype == joint

    def test_mixed_dtypes_are_promoted(self, tmp_path: Path) -> None:
        adapter = load(self.replaced(tmp_path / "a", "B.weight", torch.ones(5, 2).to(torch.bfloat16)))
        assert adapter.modules["layers.0.q_proj"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"r": 8}, r"adapter_config.json: r = 8: layers\.0\.q_proj has rank 2 in the file.*says 8"),
            ({"r": None}, r"adapter_config.json: r = null: .*says 8"),
            ({"rank_pattern": {"q_proj": 16}}, r"rank_pattern = .*q_proj has rank 2 in the file.*says 16"),
        ],
    )
    def test_a_rank_that_contradicts_the_config(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as refused:
            load(zoo.simple(tmp_path / "a", **config))
        assert refused.value.remedy

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite(self, tmp_path: Path, value: float) -> None:
        adapter = load(self.replaced(tmp_path / "a", "B.weight", torch.tensor([[1.0, value]]).repeat(5, 1)))
        assert adapter["layers.0.v_proj"].rank == 2
        with pytest.raises(TensorError, match=r"safetensors: .*q_proj.lora_B.weight: 5 of 10 values are NaN or inf"):
            adapter["layers.0.q_proj"]


def test_info_says_what_the_files_say(tmp_path: Path) -> None:
    config = {
        "base_model_name_or_path": "org/base",
        "revision": "v3",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": True,
        "layer_replication": [[0, 2], [1, 3]],
        "auto_mapping": {"base_model_class": "X"},
        "peft_type": "lora",
    }
    info = load(zoo.simple(tmp_path / "a", **config)).info
    assert (info.base_model, info.base_revision, info.task_type) == ("org/base", "v3", "CAUSAL_LM")
    assert info.fan_in_fan_out and info.layer_replication == ((0, 2), (1, 3)) and info.type == "LORA"
    assert info.auto_mapping == {"base_model_class": "X"} and info.revision is None
    assert info.files == (tmp_path / "a/adapter_config.json", tmp_path / "a/adapter_model.safetensors")


def test_factors_are_read_when_asked_for(tmp_path: Path) -> None:
    folder = zoo.simple(tmp_path / "a")
    adapter = load(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert adapter.modules["layers.0.q_proj"].rank == 2
    with pytest.raises(CoremergeError, match=r"adapter_model\.safetensors"):
        adapter["layers.0.q_proj"]


def test_thousands_of_modules_open_from_the_header_alone(tmp_path: Path) -> None:
    names = [f"layers.{i}.{kind}_proj" for i in range(500) for kind in "qkvo"]
    tensors = zoo.lora(*names, rank=1, shape=(1, 1))
    pattern = dict.fromkeys(names[:200], 1)
    adapter = load(zoo.by_hand(tmp_path / "a", tensors, r=1, lora_alpha=2, rank_pattern=pattern))
    assert len(adapter) == 2000
    assert adapter["layers.7.q_proj"].dense().item() == pytest.approx(
        2 * tensors["base_model.model.layers.7.q_proj.lora_A.weight"].item()
        * tensors["base_model.model.layers.7.q_proj.lora_B.weight"].item()
    )  # fmt: skip


def test_a_rewritten_round_trip_is_the_same_update(tmp_path: Path) -> None:
    """α = r with the scale folded in, as the writer does it, is read back as the same matrix."""
    adapter = load(zoo.simple(tmp_path / "a", lora_alpha=7))
    tensors = {}
    for name, update in adapter.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.left.contiguous()
    again = load(zoo.by_hand(tmp_path / "b", tensors, r=2, lora_alpha=2))
    for name in adapter:
        assert torch.equal(adapter[name].dense(), again[name].dense())


def test_save_file_is_what_peft_uses(tmp_path: Path) -> None:
    """A file without metadata (hand-made) is read as well."""
    folder = zoo.simple(tmp_path / "a")
    save_file(zoo.lora("x"), folder / "adapter_model.safetensors")
    assert list(load(folder)) == ["x"]
