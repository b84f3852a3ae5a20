"""What is written is what PEFT loads, or nothing is there."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from layers import INPUTS, KINDS, Net, adapter, changed, stacked
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import coremerge
from coremerge.adapter import Adapter, Info, Module
from coremerge.errors import ConfigError, OutputError, TensorError
from coremerge.formats import atomic
from coremerge.formats.atomic import atomic_directory
from coremerge.formats.safetensors_layout import Layout, TensorFile, output_dtype
from coremerge.formats.writer import PREFIX, save, target_modules
from coremerge.lowrank import LowRank

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 0.2,
    torch.float16: 0.03,
}

INFINITE = Adapter.from_updates({"a": LowRank(torch.full((2, 1), torch.inf), torch.ones(1, 2))})


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_layers(loaded, expected, names, tolerance=2e-5):
    """2e-5: factors that were rounded to float32, and outputs of size 10."""
    for name in names:
        x = INPUTS[name]()
        x = x.double() if x.is_floating_point() else x
        torch.testing.assert_close(loaded(name, x), expected(name, x), rtol=tolerance, atol=tolerance)


class TestPeftLoads:
    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    def test_every_layer_type(self, tmp_path, dtype):
        made = adapter(dtype=dtype)
        saved = made.save(tmp_path / "out")
        assert (saved.dtype, saved.rank) == (dtype, 3)
        loaded = PeftModel.from_pretrained(Net(torch.float64), tmp_path / "out", autocast_adapter_dtype=False)
        assert_same_layers(loaded, changed(Net(torch.float64), made), KINDS, TOLERANCE[dtype])

    def test_layers_that_were_not_adapted_are_not_wrapped(self, tmp_path):
        save(adapter(), tmp_path / "out")
        loaded = PeftModel.from_pretrained(Net(), tmp_path / "out")
        wrapped = {name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
        assert wrapped == set(KINDS)

    def test_conv1d_of_gpt2(self, tmp_path):
        made = adapter({"gpt": Module((5, 6), 2)}, info=Info(fan_in_fan_out=True))
        save(made, tmp_path / "out", dtype="float64")
        assert config(tmp_path / "out")["fan_in_fan_out"] is True
        loaded = PeftModel.from_pretrained(Net(torch.float64), tmp_path / "out", autocast_adapter_dtype=False)
        assert_same_layers(loaded, changed(Net(torch.float64), made), ["gpt"], 1e-12)

    def test_biases_and_zeros_for_modules_without_one(self, tmp_path):
        kinds = {name: module for name, module in KINDS.items() if module.kind != "embedding"}
        made = adapter(kinds, biases={"block.linear": torch.arange(5.0), "conv2": -torch.arange(4.0)})
        save(made, tmp_path / "out", dtype="float64")
        assert config(tmp_path / "out")["lora_bias"] is True
        assert not weights(tmp_path / "out")[f"{PREFIX}conv1.lora_B.bias"].any()
        loaded = PeftModel.from_pretrained(Net(torch.float64), tmp_path / "out", autocast_adapter_dtype=False)
        assert_same_layers(loaded, changed(Net(torch.float64), made), kinds, 1e-12)

    def test_modules_to_save(self, tmp_path):
        extras = {"head.weight": torch.randn(2, 5).half(), "head.bias": torch.randn(2)}
        save(adapter(extras=extras, info=Info(modules_to_save=("head",))), tmp_path / "out")
        assert weights(tmp_path / "out")[f"{PREFIX}head.weight"].dtype == torch.float16
        loaded = PeftModel.from_pretrained(Net(), tmp_path / "out")
        x = INPUTS["head"]()
        torch.testing.assert_close(loaded("head", x), x @ extras["head.weight"].float().T + extras["head.bias"])

    def test_trained_token_rows(self, tmp_path):
        kinds = {"block.linear": KINDS["block.linear"]}
        rows = torch.randn(2, 4)
        made = adapter(
            kinds,
            extras={"block.embed.token_adapter.trainable_tokens_delta": rows},
            info=Info(token_indices={"block.embed": (7, 2)}),
        )
        save(made, tmp_path / "out")
        expected = Net().block["embed"].weight.detach().clone()
        expected[[7, 2]] = rows
        loaded = PeftModel.from_pretrained(Net(), tmp_path / "out")
        torch.testing.assert_close(loaded("block.embed", torch.arange(9)), expected)

    @pytest.mark.parametrize("rank_pattern", [False, True])
    def test_multihead_attention(self, tmp_path, rank_pattern):
        class Attending(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
                self.head = nn.Linear(6, 5)

            def forward(self, x):
                return self.head(self.mha(x, x, x)[0])

        settings = LoraConfig(r=3, lora_alpha=3, target_modules=["mha", "head"], rank_pattern={"mha": 2})
        peft = get_peft_model(Attending(), settings)
        randomise(peft)
        peft.save_pretrained(tmp_path / "in")
        save(coremerge.load(tmp_path / "in"), tmp_path / "out", rank_pattern=rank_pattern)
        assert bool(config(tmp_path / "out").get("rank_pattern")) == rank_pattern
        x = torch.randn(2, 3, 6)
        loaded = PeftModel.from_pretrained(Attending(), tmp_path / "out")
        torch.testing.assert_close(loaded(x), peft.eval()(x), rtol=2e-5, atol=2e-4)  # all in float32, of size 10

    def test_each_module_at_its_own_rank(self, tmp_path):
        made = adapter()
        save(made, tmp_path / "out", rank_pattern=True, dtype="float64")
        smaller = {name: module.rank for name, module in made.modules.items() if module.rank < 3}
        written = config(tmp_path / "out")
        assert written["r"] == 3 and written["rank_pattern"] == written["alpha_pattern"] == smaller
        assert {name: module.rank for name, module in coremerge.load(tmp_path / "out").modules.items()} == {
            name: module.rank for name, module in made.modules.items()
        }
        loaded = PeftModel.from_pretrained(Net(torch.float64), tmp_path / "out", autocast_adapter_dtype=False)
        assert_same_layers(loaded, changed(Net(torch.float64), made), KINDS, 1e-12)

    def test_own_ranks_where_one_name_ends_like_another(self, tmp_path):
        names = {"linear": 1, "block.linear": 2, "head": 3}
        made = Adapter.from_updates({n: LowRank(torch.randn(2, r), torch.randn(r, 3)) for n, r in names.items()})
        save(made, tmp_path / "out", rank_pattern=True)
        assert list(config(tmp_path / "out")["rank_pattern"].items()) == [("block.linear", 2), ("linear", 1)]
        assert {name: m.rank for name, m in coremerge.load(tmp_path / "out").modules.items()} == names

    def test_own_ranks_where_the_name_of_a_larger_one_ends_like_a_smaller_one(self, tmp_path):
        names = {"fc": 1, "visual.fc": 3, "visual.refc": 3, "text.visual.fc": 2}
        made = Adapter.from_updates({n: LowRank(torch.randn(2, r), torch.randn(r, 3)) for n, r in names.items()})
        save(made, tmp_path / "out", rank_pattern=True)
        listed = [("text.visual.fc", 2), ("visual.fc", 3), ("fc", 1)]
        assert list(config(tmp_path / "out")["rank_pattern"].items()) == listed
        assert {name: m.rank for name, m in coremerge.load(tmp_path / "out").modules.items()} == names

    def test_round_trip_of_what_peft_wrote(self, tmp_path):
        settings = LoraConfig(
            r=4, lora_alpha=3, use_rslora=True, target_modules=["linear", "conv2"], rank_pattern={"conv2": 2}
        )
        peft = get_peft_model(Net(), settings)
        randomise(peft)
        peft.save_pretrained(tmp_path / "in")
        coremerge.load(tmp_path / "in").save(tmp_path / "out")
        again = PeftModel.from_pretrained(Net(), tmp_path / "out")
        for name in ("block.linear", "conv2"):
            x = INPUTS[name]()
            torch.testing.assert_close(again(name, x), peft(name, x), rtol=2e-5, atol=2e-5)  # in float32
        written = config(tmp_path / "out")
        assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
        assert not written.get("rank_pattern")


def randomise(peft):
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)


class TestProfile:
    def test_config(self, tmp_path):
        info = Info(
            base_model="org/base",
            base_revision="abc",
            revision="not the base's",
            task_type="CAUSAL_LM",
            layer_replication=((0, 2), (1, 3)),
            auto_mapping={"parent_library": "transformers"},
            targets=("q_proj", "v_proj"),
            notes=("read from somewhere",),
        )
        save(replace_info(stacked(), info), tmp_path / "out")
        assert config(tmp_path / "out") == {
            "auto_mapping": {"parent_library": "transformers"},
            "base_model_name_or_path": "org/base",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": [[0, 2], [1, 3]],
            "lora_alpha": 2,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 2,
            "revision": "abc",
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": None,
            "use_rslora": False,
        }
        LoraConfig.from_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("name", ["日本/基", "half a pair: \ud83d"])
    def test_names_in_any_script(self, tmp_path, name):
        save(replace_info(stacked(), Info(base_model=name)), tmp_path / "out")
        assert coremerge.load(tmp_path / "out").info.base_model == name

    def test_keys_and_shapes(self, tmp_path):
        save(adapter(), tmp_path / "out")
        shapes = {key.removeprefix(PREFIX): tuple(t.shape) for key, t in weights(tmp_path / "out").items()}
        assert shapes == {
            "block.linear.lora_A.weight": (3, 6),
            "block.linear.lora_B.weight": (5, 3),
            "block.embed.lora_embedding_A": (3, 9),
            "block.embed.lora_embedding_B": (4, 3),
            "conv1.lora_A.weight": (3, 2, 3),
            "conv1.lora_B.weight": (4, 3, 1),
            "conv2.lora_A.weight": (3, 2, 2, 3),
            "conv2.lora_B.weight": (4, 3, 1, 1),
            "conv3.lora_A.weight": (3, 2, 2, 2, 2),
            "conv3.lora_B.weight": (3, 3, 1, 1, 1),
        }
        with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_smaller_ranks_get_zeros(self, tmp_path):
        save(adapter(), tmp_path / "out")
        held = weights(tmp_path / "out")
        assert not held[f"{PREFIX}block.linear.lora_A.weight"][2:].any()
        assert not held[f"{PREFIX}block.linear.lora_B.weight"][:, 2:].any()

    def test_factors_are_written_as_given(self, tmp_path):
        made = adapter()
        save(made, tmp_path / "out", dtype=torch.float64)
        held = weights(tmp_path / "out")
        assert torch.equal(held[f"{PREFIX}block.linear.lora_B.weight"][:, :2], made["block.linear"].left)
        assert torch.equal(held[f"{PREFIX}block.linear.lora_A.weight"][:2], made["block.linear"].right)

    def test_an_update_of_rank_zero(self, tmp_path):
        save(Adapter.from_updates({"a": LowRank.zeros(3, 2)}), tmp_path / "out")
        assert config(tmp_path / "out")["r"] == 1
        assert not coremerge.load(tmp_path / "out")["a"].dense().any()

    def test_saved(self, tmp_path):
        saved = save(adapter(), tmp_path / "out", files={"README.md": "hello", "blob": b"\0"})
        assert saved.path == tmp_path / "out"
        assert saved.bytes == (tmp_path / "out/adapter_model.safetensors").stat().st_size
        assert saved.sha256.keys() == {"adapter_model.safetensors"}
        assert len(saved.sha256["adapter_model.safetensors"]) == 64
        assert (tmp_path / "out/README.md").read_text() == "hello"
        assert (tmp_path / "out/blob").read_bytes() == b"\0"

    def test_progress(self, tmp_path):
        seen = []
        save(adapter(), tmp_path / "out", progress=lambda done, count: seen.append((done, count)))
        assert seen == [(i, 5) for i in range(1, 6)]


def replace_info(made, info):
    return Adapter(made.modules, made.__getitem__, info=info, biases=made.biases, extras=made.extras)


class TestTargets:
    def test_full_names_where_nothing_is_known_of_the_base(self):
        names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qv"]
        assert target_modules(names) == sorted(names)
        assert target_modules(names, ["o_proj", "proj", "attn.q_proj"]) == sorted(names)

    @pytest.mark.parametrize("layers", [range(12), [3, 7, 11], [5]])
    def test_bare_names_wherever_they_are_known_to_suffice(self, layers):
        names = [f"encoder.layer.{i}.attention.self.{x}" for i in layers for x in ("query", "value")]
        assert target_modules(names, ["query", "value"]) == ["query", "value"]
        assert target_modules([*names, *(name.replace("encoder", "vision") for name in names)], ["query", "value"]) == [
            "query", "value"
        ]  # fmt: skip
        assert target_modules(names, ["attention.self.query", "query", "value"]) == ["query", "value"]
        assert target_modules([*names, "head"], ["query", "value"]) == ["head", "query", "value"]

    def test_a_module_in_a_dropped_head_is_not_adapted(self):
        info = Info(targets=("dense",), modules_to_save=("classifier",))
        made = [
            Adapter.from_updates(
                {"encoder.dense": LowRank(torch.ones(2, 1), torch.ones(1, 2))}, info=info, name=name,
                extras={"classifier.dense.weight": torch.full((2, 2), value)},
            ) for name, value in (("a", 1.0), ("b", 2.0))
        ]  # fmt: skip
        known = [
            coremerge.merge(made, coremerge.Recipe(extras=policy)).adapter.info.targets for policy in ("a", "drop")
        ]
        assert known == [("dense",), ()]

    @pytest.mark.parametrize(
        ("changes", "known"),
        [
            ({}, ("q_proj",)),
            ({"layers_to_transform": [], "exclude_modules": None}, ("q_proj",)),
            ({"layers_to_transform": [0, 1]}, ()),
            ({"layers_to_transform": 0}, ()),
            ({"exclude_modules": ["layers.7.q_proj"]}, ()),
            ({"target_modules": r".*\.q_proj"}, ("q_proj",)),
            ({"target_modules": ".*q_proj"}, ("q_proj",)),
            ({"target_modules": r".*self_attn\.(q|v)_proj"}, ("self_attn.q_proj", "self_attn.v_proj")),
            ({"target_modules": "all-linear"}, ("q_proj", "v_proj")),
            ({"target_modules": "all-linear", "exclude_modules": ["x"]}, ()),
            ({"target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"}, ()),
            ({"target_modules": r".*layers\.[01]\..*q_proj"}, ()),
            ({"target_modules": "q_proj"}, ()),
            ({"target_modules": "(q_proj"}, ()),
            ({"target_modules": "((.*)*)*q_proj"}, ()),
            ({"target_modules": None}, ()),
        ],
    )
    def test_what_a_config_says_of_the_base(self, tmp_path, changes, known):
        save(stacked(), tmp_path / "a")
        told = config(tmp_path / "a") | {"target_modules": ["q_proj"]} | changes
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(told))
        assert coremerge.load(tmp_path / "a").info.targets == known

    def test_layers_above_the_adapted_ones_stay_bare(self, tmp_path):
        def base():
            layers = [nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj")}) for _ in range(3)]
            return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})

        for name, settings in (("low", {"target_modules": ["v_proj"], "layers_to_transform": [0, 1]}),
                               ("all", {"target_modules": ["q_proj"]})):  # fmt: skip
            peft = get_peft_model(base(), LoraConfig(r=1, **settings))
            randomise(peft)
            peft.save_pretrained(tmp_path / name)
        inputs = [coremerge.load(tmp_path / name) for name in ("low", "all")]
        coremerge.merge(inputs, coremerge.Recipe(allow_disjoint=True)).adapter.save(tmp_path / "both")
        for name, made in zip(("low2", "all2"), inputs, strict=True):
            made.save(tmp_path / name)
        assert config(tmp_path / "all2")["target_modules"] == ["q_proj"]
        for name, count in (("low2", 2), ("all2", 3), ("both", 5)):
            loaded = PeftModel.from_pretrained(base(), tmp_path / name)
            assert len([name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]) == count


class TestBytes:
    def test_same_for_any_number_of_threads_and_again(self, tmp_path):
        made = stacked(layers=6, width=33, rank=5)
        hashes = [
            save(made, tmp_path / str(i), threads=threads, dtype="bf16").sha256
            for i, threads in enumerate((1, 4, 1, None))
        ]
        assert all(each == hashes[0] for each in hashes)

    def test_modules_are_asked_for_one_by_one(self, tmp_path):
        alive, most = 0, 0
        made = stacked(layers=8)

        class Counted(LowRank):
            def __del__(self):
                nonlocal alive
                alive -= 1

        def load(name):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            update = made[name]
            return Counted(update.left, update.right)

        save(Adapter(made.modules, load), tmp_path / "out")
        assert most <= 2

    def test_wide_dtypes_come_first(self):
        layout = Layout.of({"a": ("U8", (3,)), "b": ("F32", ()), "c": ("F64", (2, 0)), "d": ("F64", (2,))})
        assert [(key, slot.start) for key, slot in layout.slots.items()] == [("d", 0), ("b", 16), ("a", 20), ("c", 23)]
        assert len(layout.head) % 8 == 0

    def test_dtypes_by_name(self):
        assert output_dtype("fp16") is torch.float16
        assert output_dtype("torch.bfloat16") is torch.bfloat16
        with pytest.raises(ConfigError, match=r"dtype = \"int8\".*float32"):
            output_dtype("int8")


class TestRefusals:
    @pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("bf16", 1e39), ("float32", 1e39)])
    def test_overflow_names_module_dtype_and_remedy(self, tmp_path, dtype, value):
        left = torch.full((2, 1), value, dtype=torch.float64)
        made = Adapter.from_updates({"a.b": LowRank(left, torch.ones(1, 2, dtype=torch.float64))})
        with pytest.raises(TensorError, match=r"a\.b: values up to .* do not fit .*--dtype"):
            save(made, tmp_path / "out", dtype=dtype)
        assert list(tmp_path.iterdir()) == []

    def test_values_that_are_not_finite(self, tmp_path):
        made = Adapter.from_updates({"a": LowRank(torch.full((2, 1), torch.nan), torch.ones(1, 2))})
        with pytest.raises(TensorError, match="a: the result has NaN"):
            save(made, tmp_path / "out")

    def test_large_finite_values_are_fine(self, tmp_path):
        made = Adapter.from_updates({"a": LowRank(torch.full((4, 1), 3e38), torch.ones(1, 2))})
        save(made, tmp_path / "out")

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(OutputError, match="without modules"):
            save(Adapter.from_updates({}), tmp_path / "out")

    def test_an_update_that_is_not_what_was_announced(self, tmp_path):
        made = Adapter({"a": Module((3, 2), 1)}, lambda name: LowRank(torch.ones(3, 2), torch.ones(2, 2)))
        with pytest.raises(TensorError, match="a: announced as"):
            save(made, tmp_path / "out")

    def test_biases_beside_an_embedding(self, tmp_path):
        with pytest.raises(OutputError, match=r"block\.embed: .*lora_bias"):
            save(adapter(biases={"block.linear": torch.ones(5)}), tmp_path / "out")

    def test_a_module_both_adapted_and_saved_whole(self, tmp_path):
        made = adapter(
            {"block.linear": KINDS["block.linear"]},
            extras={"block.linear.weight": torch.ones(5, 6)},
            info=Info(modules_to_save=("linear",)),
        )
        with pytest.raises(OutputError, match=r"block\.linear: trained whole"):
            save(made, tmp_path / "out")

    def test_an_extra_of_a_dtype_without_a_name(self, tmp_path):
        with pytest.raises(TensorError, match=r"head: dtype torch\.complex64"):
            save(adapter(extras={"head": torch.ones(2, dtype=torch.complex64)}), tmp_path / "out")

    def test_file_names_with_folders_in_them(self, tmp_path):
        for name in ("../x", "a/b", "..", ""):
            with pytest.raises(ValueError, match="plain file name"):
                save(adapter(), tmp_path / "out", files={name: ""})
        assert list(tmp_path.iterdir()) == []


class TestPlace:
    def test_a_home_folder_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        saved = save(adapter(), "~/out")
        assert saved.path == tmp_path / "out"
        assert saved.sha256
        for path in ("~nobody-of-this-name/out", "a\0b"):
            with pytest.raises(OutputError, match="names no place"):
                save(adapter(), path)

    @pytest.mark.parametrize("letter", ["x", "é", "漢"])
    def test_names_as_long_as_the_disk_takes(self, tmp_path, letter):
        most = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..12345678.partial")
        name = letter * (most // len(letter.encode()))
        assert save(adapter(), tmp_path / name).path.name == name
        with pytest.raises(OutputError, match=rf"a name of .* bytes, and the disk takes {most} there"):
            save(adapter(), tmp_path / (name + letter))
        with pytest.raises(OutputError, match=r"a path of .* bytes"):
            save(adapter(), tmp_path.joinpath(*["x" * 200] * 25))
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_missing_parents_are_made(self, tmp_path):
        save(adapter(), tmp_path / "a/b/out")
        assert (tmp_path / "a/b/out/adapter_config.json").is_file()

    def test_missing_parents_go_again_on_failure(self, tmp_path):
        with pytest.raises(TensorError):
            save(INFINITE, tmp_path / "a/b/out")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_folder_is_used(self, tmp_path):
        (tmp_path / "out").mkdir()
        save(adapter(), tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"out"}

    def test_a_folder_in_use_is_refused(self, tmp_path):
        save(adapter(), tmp_path / "out")
        before = weights(tmp_path / "out")
        with pytest.raises(OutputError, match=r"out: exists and is not empty.*--overwrite"):
            save(stacked(), tmp_path / "out")
        assert weights(tmp_path / "out").keys() == before.keys()

    def test_overwrite_replaces_all(self, tmp_path):
        save(adapter(), tmp_path / "out", files={"old.txt": "old"})
        save(stacked(), tmp_path / "out", overwrite=True)
        assert {p.name for p in tmp_path.iterdir()} == {"out"}
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert set(coremerge.load(tmp_path / "out")) == set(stacked())

    def test_overwrite_that_fails_keeps_the_old(self, tmp_path):
        save(adapter(), tmp_path / "out")
        with pytest.raises(TensorError):
            save(INFINITE, tmp_path / "out", overwrite=True)
        assert set(coremerge.load(tmp_path / "out")) == set(adapter())
        assert {p.name for p in tmp_path.iterdir()} == {"out"}

    def test_overwrite_leaves_other_folders_alone(self, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/one.jpg").write_text("x")
        with pytest.raises(OutputError, match="photos: holds no weights"):
            save(adapter(), tmp_path / "photos", overwrite=True)

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="out: is a file"):
            save(adapter(), tmp_path / "out", overwrite=True)
        with pytest.raises(OutputError, match="below: "):
            save(adapter(), tmp_path / "out/below")
        assert (tmp_path / "out").read_text() == "mine"

    def test_the_current_folder_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for path in (".", "..", "/"):
            with pytest.raises(OutputError):
                save(adapter(), path, overwrite=True)

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        save(adapter(), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real/adapter_config.json").is_file()

    def test_inputs_are_never_overwritten(self, tmp_path):
        save(stacked(), tmp_path / "all/a")
        (tmp_path / "all/x.safetensors").touch()
        (tmp_path / "link").symlink_to(tmp_path / "all/a")
        loaded = coremerge.load(tmp_path / "all/a")
        for path in ("all/a", "all", "link", "all/b/../a"):
            with pytest.raises(OutputError, match="holds an input"):
                save(loaded, tmp_path / path, overwrite=True)
            with pytest.raises(OutputError, match="holds an input"):
                save(stacked(), tmp_path / path, overwrite=True, inputs=[tmp_path / "all/a/adapter_config.json"])
        save(loaded, tmp_path / "all/b")

    def test_one_that_appears_meanwhile_is_kept(self, tmp_path):
        def load(name):
            if not (tmp_path / "out").exists():
                save(adapter(), tmp_path / "out")
            return stacked()[name]

        with pytest.raises(OutputError, match="exists and is not empty"):
            save(Adapter(stacked().modules, load), tmp_path / "out")
        assert set(coremerge.load(tmp_path / "out")) == set(adapter())

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.ENOSPC, "the disk is full. Free some space"),
            (errno.EACCES, "may not be written. Choose a folder"),
            (errno.EROFS, "may not be written"),
            (errno.EIO, "cannot be written: "),
        ],
    )
    @pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
    def test_the_systems_errors_are_explained(self, tmp_path, monkeypatch, number, message, call):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OutputError, match=message) as raised:
            save(adapter(), tmp_path / "out")
        assert raised.value.file == str(tmp_path / "out/adapter_model.safetensors")
        assert "partial" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    def test_errors_about_other_files_stay_as_they_are(self, tmp_path):
        with pytest.raises(OutputError, match=r"^elsewhere: no"), atomic_directory(tmp_path / "out"):
            raise OutputError("no", file="elsewhere")
        with pytest.raises(OutputError, match=r"^no$"), atomic_directory(tmp_path / "out"):
            raise OutputError("no")

    def test_a_file_system_that_cannot_sync_folders(self, tmp_path, monkeypatch):
        def fsync(descriptor, sync=os.fsync):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        save(adapter(), tmp_path / "out")
        assert set(coremerge.load(tmp_path / "out")) == set(adapter())

    def test_a_former_result_that_may_not_be_written(self, tmp_path, monkeypatch):
        save(adapter(), tmp_path / "out")
        monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path / "out", os.W_OK))
        with pytest.raises(OutputError, match="out: may not be written"):
            save(stacked(), tmp_path / "out", overwrite=True)
        assert set(coremerge.load(tmp_path / "out")) == set(adapter())

    def test_a_mounted_disk(self, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
        with pytest.raises(OutputError, match=r"out: is where a disk is mounted.*Name a folder in it"):
            save(adapter(), tmp_path / "out")
        save(adapter(), tmp_path / "out/below")

    def test_a_parent_that_may_not_be_written(self, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", fail)
        with pytest.raises(OutputError, match="out: may not be written"):
            save(adapter(), tmp_path / "out")

    def test_a_folder_that_may_not_be_listed(self, tmp_path, monkeypatch):
        def fail(_):
            raise PermissionError(errno.EACCES, "Permission denied")

        (tmp_path / "out").mkdir()
        monkeypatch.setattr(Path, "iterdir", fail)
        with pytest.raises(OutputError, match="out: may not be written"):
            save(adapter(), tmp_path / "out")

    def test_a_disk_that_is_too_small_is_found_before_the_work(self, tmp_path):
        def load(name):
            raise AssertionError("must not be asked")

        huge = Adapter({"a": Module((1 << 40, 1 << 40), 8)}, load)
        with pytest.raises(OutputError, match=r"needs .* GB, and the disk has"):
            save(huge, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_rename_that_fails_brings_the_old_one_back(self, tmp_path, monkeypatch):
        save(adapter(), tmp_path / "out")
        rename = Path.rename

        def fail(self, target):
            if self.suffix == ".partial":
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OutputError, match="cannot be written"):
            save(stacked(), tmp_path / "out", overwrite=True)
        assert set(coremerge.load(tmp_path / "out")) == set(adapter())
        assert {p.name for p in tmp_path.iterdir()} == {"out"}

    def test_what_another_process_puts_there_at_the_last_moment_stays(self, tmp_path, monkeypatch):
        swap = atomic._swap

        def late(partial, out, overwrite):
            out.mkdir()
            (out / "theirs.safetensors").write_text("theirs")
            swap(partial, out, overwrite)

        monkeypatch.setattr(atomic, "_swap", late)
        with pytest.raises(OutputError, match=r"out: another process wrote it just now. Let one finish"):
            save(adapter(), tmp_path / "out")
        assert {p.name for p in tmp_path.rglob("*")} == {"out", "theirs.safetensors"}

    @pytest.mark.parametrize("moment", ["before", "between"])
    def test_of_two_that_overwrite_one_is_there_whole(self, tmp_path, monkeypatch, moment):
        out, rename = tmp_path / "out", Path.rename
        save(adapter(), out)
        save(stacked(), tmp_path / "theirs")

        def late(self, target):
            theirs, old = tmp_path / "theirs", self == out
            if old and theirs.exists() and moment == "before":
                shutil.rmtree(out)
                rename(theirs, out)
            result = rename(self, target)
            if old and theirs.exists():
                rename(theirs, out)
            return result

        monkeypatch.setattr(Path, "rename", late)
        if moment == "between":
            with pytest.raises(OutputError, match="another process wrote it just now"):
                save(adapter(), out, overwrite=True)
        else:
            save(adapter(), out, overwrite=True)
        assert set(coremerge.load(out)) == set(stacked() if moment == "between" else adapter())
        assert {p.name for p in tmp_path.iterdir()} == {"out"}

    def test_a_folder_that_goes_at_the_last_moment(self, tmp_path, monkeypatch):
        monkeypatch.setattr(atomic, "_sync", lambda partial: shutil.rmtree(tmp_path / "in"))
        with pytest.raises(OutputError, match=r"out: its folder is gone. Check what removed it"):
            save(adapter(), tmp_path / "in/out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (errno.EFBIG, r"larger than a file may be here. Raise the limit \(ulimit -f\)"),
            (errno.ENOSPC, "the disk is full. Free some space"),
            (errno.EIO, "cannot be written: Input/output error. Check the disk"),
        ],
    )
    def test_what_the_system_refuses(self, tmp_path, monkeypatch, number, said):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=rf"adapter_model.safetensors: {said}"):
            save(adapter(), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_link_to_itself_is_refused(self, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "out")
        with pytest.raises(OutputError, match="out: a link that leads to itself"):
            save(adapter(), tmp_path / "out")

    def test_a_tensor_that_was_forgotten_is_noticed(self, tmp_path):
        layout = Layout.of({"a": ("F32", (2,)), "b": ("F32", (2,))})
        with (
            pytest.raises(RuntimeError, match="1 tensors were never written: b"),
            TensorFile(tmp_path / "x", layout) as file,
        ):
            file.write("a", torch.ones(2))

    def test_a_tensor_that_does_not_fit_is_noticed(self, tmp_path):
        with TensorFile(tmp_path / "x", Layout.of({"a": ("F32", (2,))})) as file:
            with pytest.raises(ValueError, match="laid out as"):
                file.write("a", torch.ones(3))
            with pytest.raises(ValueError, match="do not fit"):
                file.write_bytes("a", b"123456789")
            file.write("a", torch.ones(2))


class TestInterruption:
    def test_ctrl_c_leaves_nothing(self, tmp_path):
        for threads in (1, 3):
            calls = []

            def load(name, calls=calls):
                calls.append(name)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return stacked()[name]

            with pytest.raises(KeyboardInterrupt):
                save(Adapter(stacked(layers=4).modules, load), tmp_path / "out", threads=threads)
            assert list(tmp_path.iterdir()) == []

    def test_no_thread_outlives_it(self, tmp_path):
        def progress(done, count):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as raised:
            save(stacked(layers=9), tmp_path / "out", threads=3, progress=progress)
        assert raised.tb  # which holds all frames
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("coremerge")]
        assert list(tmp_path.iterdir()) == []

    def test_any_error_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    SLOW = textwrap.dedent("""
        import os, signal, sys, time
        import torch
        from coremerge.adapter import Adapter, Module
        from coremerge.formats.writer import save
        from coremerge.lowrank import LowRank

        def load(name):
            time.sleep(0.002)
            return LowRank(torch.ones(32, 2), torch.ones(2, 32))

        made = Adapter({f"layers.{i}.q_proj": Module((32, 32), 2) for i in range(40)}, load)
        for i in range(12):
            child = os.fork()
            if not child:
                save(made, f"{sys.argv[1]}/new-{i}", threads=2)
                save(made, f"{sys.argv[1]}/old", overwrite=True, threads=2)
                os._exit(0)
            time.sleep(0.01 + 0.011 * i)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    """)

    def test_a_kill_leaves_all_or_nothing(self, tmp_path):
        save(stacked(), tmp_path / "old")
        subprocess.run([sys.executable, "-c", self.SLOW, tmp_path], check=True)
        seen = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
        assert len([name for name in seen if name.startswith("new")]) < 12, "no kill came in time"
        assert list(tmp_path.glob(".new-*.partial")), "no kill came in time"
        for name in seen:
            assert len(coremerge.load(tmp_path / name).load()) in ((4, 40) if name == "old" else (40,))
