"""Keys that training wrapped, doubled or prefixed are read under the base model's own names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn

from coremerge import load
from coremerge.errors import TensorError
from coremerge.formats.names import PREFIX, Names
from coremerge.pipeline import merge_files
from coremerge.recipe import Recipe

MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("module", "q_proj")]
SUM = Recipe(method="sum", steps=[], scale=1.0, dtype="float32")


def written(folder: Path, spell: Callable[[str], str], seed: int = 0, **config: Any) -> Path:
    tensors = {spell(key): value for key, value in zoo.lora(*MODULES, seed=seed).items()}
    targets = ["q_proj", "module"]
    return zoo.by_hand(folder, tensors, **{"r": 2, "lora_alpha": 4, "target_modules": targets, **config})


def inside(words: str) -> Callable[[str], str]:
    return lambda key: key.replace(PREFIX, PREFIX + words)


def before(words: str) -> Callable[[str], str]:
    return lambda key: words + key


def layer(word: str) -> Callable[[str], str]:
    return lambda key: re.sub(r"(layers\.\d)", rf"\1.{word}", key)


SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled, then adapted": (inside("_orig_mod."), "_orig_mod"),
    "adapted, then compiled": (before("_orig_mod."), "_orig_mod"),
    "layers compiled": (layer("_orig_mod"), "_orig_mod"),
    "the inner model compiled": (lambda key: key.replace("model.layers", "model._orig_mod.layers"), "_orig_mod"),
    "factors compiled": (lambda key: key.replace(".weight", "._orig_mod.weight"), "_orig_mod"),
    "factors compiled, the adapter's name left in": (
        lambda key: key.replace(".weight", ".default._orig_mod.weight"), "_orig_mod"
    ),
    "layers checkpointed": (layer("_checkpoint_wrapped_module"), "_checkpoint_wrapped_module"),
    "FSDP around all": (before("_fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "FSDP around base and layers": (
        lambda key: inside("_fsdp_wrapped_module.")(layer("_fsdp_wrapped_module")(key)), "_fsdp_wrapped_module"
    ),
    "FSDP over checkpointing": (
        layer("_fsdp_wrapped_module._checkpoint_wrapped_module"), "_checkpoint_wrapped_module"
    ),
    "FSDP of XLA": (before("_fsdp_wrapped_module._fpw_module."), "_fpw_module"),
    "DDP around all": (before("module."), "module"),
    "DDP twice": (before("module.module."), "module"),
    "DDP around the base": (inside("module."), "module"),
    "DDP around compiled": (before("module._orig_mod."), "module"),
    "compiled around DDP": (inside("_orig_mod.module."), "module"),
    "Fabric": (before("_forward_module.module."), "_forward_module"),
    "Opacus": (before("_module."), "_module"),
    "a strategy nobody has heard of": (before("_strategy_module."), "_strategy_module"),
    "layers of such a one": (layer("_ddp_wrapped_module"), "_ddp_wrapped_module"),
    "a trainer's actor": (before("actor."), "without actor before the prefix"),
    "a trainer's actor under DDP": (before("actor.module."), "without actor before the prefix"),
    "a trainer's actor, compiled, under DDP": (before("module.actor._orig_mod.module."), "without actor before"),
    "a Lightning module's, by another name": (before("lit_model."), "without lit_model before the prefix"),
    "half of the prefix before it": (before("base_model."), "without base_model"),
    "a Lightning module": (before("model."), "without model before the prefix"),
    "a value head's model": (before("pretrained_model."), "pretrained_model"),
    "the prefix twice": (before(PREFIX), "base_model.model. once"),
    "the prefix three times": (before(PREFIX * 2), "base_model.model. once"),
    "the prefix twice, compiled": (before(PREFIX + "_orig_mod."), "base_model.model. once"),
    "no prefix, but DDP": (lambda key: key.replace(PREFIX, "module."), "without module"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrapped_adapter_is_the_plain_one(tmp_path: Path, spelling: str) -> None:
    spell, word = SPELLINGS[spelling]
    plain, adapter = load(written(tmp_path / "plain", str)), load(written(tmp_path / "a", spell))
    assert list(adapter) == MODULES
    assert all(torch.equal(adapter[name].dense(), plain[name].dense()) for name in MODULES)
    (note,) = (note for note in adapter.info.notes if "own names" in note)
    assert word in note and "8 keys" in note


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_peft_loads_every_factor_of_what_is_written(tmp_path: Path, spelling: str) -> None:
    spell, _ = SPELLINGS[spelling]
    sources = [written(tmp_path / "a", spell), written(tmp_path / "b", spell, seed=1)]
    merge_files(sources, tmp_path / "out", SUM)
    model = zoo.loaded(tmp_path / "out", zoo.Decoder())
    a, b = map(load, sources)
    for name in MODULES:
        torch.testing.assert_close(zoo.delta(model, name), a[name].dense() + b[name].dense(), rtol=1e-5, atol=1e-5)


class Omni(nn.Module):
    """A family of models, one of which was adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = zoo.Decoder()
        self.talker = zoo.Decoder()

    def forward(self, x: Tensor) -> Tensor:
        """Only so that PEFT takes it for a model."""
        return self.thinker(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spell", [before("thinker."), inside("thinker." + PREFIX), before("_orig_mod.thinker.")])
def test_a_family_word_belongs_behind_the_prefix(tmp_path: Path, spell: Callable[[str], str]) -> None:
    source = written(tmp_path / "a", spell)
    merge_files([source], tmp_path / "out", SUM)
    zoo.loaded(tmp_path / "out", Omni())
    assert list(load(source)) == ["thinker." + name for name in MODULES]


class Holder(nn.Module):
    """A model of one's own, whose modules are called as wrappers and prefixes are."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": zoo.Decoder()})
        self.module = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Only so that PEFT takes it for a model."""
        return self.module(x)  # type: ignore[no-any-return]


def test_modules_that_are_really_called_so_keep_their_names(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    source = zoo.save(zoo.adapted(config, Holder(), dtype=torch.float32), tmp_path / "a")
    assert list(load(source)) == [f"base_model.model.model.layers.{i}.q_proj" for i in (0, 1)]
    merge_files([source], tmp_path / "out", SUM)
    zoo.loaded(tmp_path / "out", Holder())


@pytest.mark.parametrize("path", ["module", "base_model.q_proj", "base_model.model.module.x.q_proj"])
def test_a_word_that_not_every_key_has_is_a_modules_own(path: str) -> None:
    keys = [f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}other.module.lora_A.weight"]
    names = Names(keys, {"auto_mapping": {"parent_library": "mine"}} if "base_model.model" in path else {})
    assert [PREFIX + names(key) for key in keys] == keys
    assert not names.notes


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    def both(tensors: dict[str, Tensor]) -> None:
        tensors.update({before("_orig_mod.")(key): value + 1 for key, value in dict(tensors).items()})

    with pytest.raises(TensorError, match=r"two tensors for one place: _orig_mod.*and base_model"):
        load(zoo.simple(tmp_path / "a", change=both))


def test_flattened_shards_are_refused_by_name(tmp_path: Path) -> None:
    flat = {"base_model.model._fsdp_wrapped_module._flat_param": torch.ones(9)}
    with pytest.raises(TensorError, match=r"_flat_param.*gather the full state"):
        load(zoo.simple(tmp_path / "a", change=lambda tensors: tensors.update(flat)))


def test_a_wrapper_that_nobody_knows_is_said(tmp_path: Path) -> None:
    adapter = load(written(tmp_path / "a", inside("_mystery.")))
    assert any("_mystery.model.layers.0.q_proj" in note for note in adapter.info.notes)


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("word", ["_orig_mod.", "module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_patterns_and_heads_are_normalised_too(tmp_path: Path, word: str, escaped: bool) -> None:
    pattern = f"^{word}model.layers.1.q_proj"
    if escaped:
        pattern = pattern.replace(".", r"\.")
    tensors = {inside(word)(key): value for key, value in zoo.lora(MODULES[1]).items()}
    tensors |= {inside(word)(key): value for key, value in zoo.lora(MODULES[3], rank=3).items()}
    tensors[f"{PREFIX}{word}score.modules_to_save.default.weight"] = torch.ones(3, 4)
    tensors[f"{PREFIX}{word}model.embed.token_adapter.trainable_tokens_delta"] = torch.ones(2, 4)
    adapter = load(zoo.by_hand(
        tmp_path / "a", tensors, r=2, lora_alpha=4, rank_pattern={pattern: 3}, alpha_pattern={pattern: 9},
        modules_to_save=[f"{word}score"], trainable_token_indices={f"{word}model.embed": [1, 2]},
        target_modules=[f"{word}{MODULES[1]}", f"{word}{MODULES[3]}"],
    ))  # fmt: skip
    assert {name: (module.rank, module.scale) for name, module in adapter.modules.items()} == {
        MODULES[1]: (2, 2.0), MODULES[3]: (3, 3.0)
    }  # fmt: skip
    assert adapter.info.modules_to_save == ("score",)
    assert adapter.info.token_indices == {"model.embed": (1, 2)}
    assert sorted(adapter.extras) == ["model.embed.token_adapter.trainable_tokens_delta", "score.weight"]
    assert adapter.info.targets == (MODULES[1], MODULES[3])


@pytest.mark.parametrize("spell", [before("module."), before("_orig_mod."), before(PREFIX)])
def test_a_veras_shared_projections_are_found(tmp_path: Path, spell: Callable[[str], str]) -> None:
    import peft

    config = peft.VeraConfig(r=3, target_modules=["layers.0.q_proj", "layers.1.q_proj"])
    source = zoo.save(zoo.adapted(config, dtype=torch.float32), tmp_path / "a")
    plain = load(source)
    tensors = {spell(key): value for key, value in load_file(source / "adapter_model.safetensors").items()}
    settings = json.loads((source / "adapter_config.json").read_text()) | {"auto_mapping": None}
    wrapped = load(zoo.by_hand(tmp_path / "b", tensors, **settings))
    assert list(wrapped) == list(plain) != []
    assert all(torch.equal(wrapped[name].dense(), plain[name].dense()) for name in plain)
