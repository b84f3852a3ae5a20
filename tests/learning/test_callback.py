"""The null-space ratio while PEFT trains with the Trainer."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import coremerge.learning
from coremerge import Adapter, LowRank
from coremerge.errors import MismatchError, MissingExtraError
from coremerge.learning import NullSpaceCallback, measure_null_space, null_space_ratio
from coremerge.learning.callback import null_space_of_training
from families import batches, make_model
from tolerances import SINGLE

TARGETS = ["query", "value"]


def make_peft(family="bert", targets=TARGETS):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        return get_peft_model(make_model(family), LoraConfig(r=3, target_modules=targets, lora_dropout=0.5))


def train(tmp_path, callback=True, every=2):
    model = make_peft()
    rows = [{"input_ids": b["input_ids"][0], "labels": torch.tensor(i % 2)} for i, b in enumerate(batches("bert", 12))]
    arguments = TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, learning_rate=0.05, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, arguments, train_dataset=rows)
        if callback:
            trainer.add_callback(NullSpaceCallback(trainer, batches("bert", 2, seed=9), every=every))
        trainer.train()
    return trainer


def test_it_is_in_the_trainers_log(tmp_path, capsys):
    logged = [entry for entry in train(tmp_path).state.log_history if "null_space/mean" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4, 5]
    ratios = [entry["null_space/bert.encoder.layer.2.attention.self.value"] for entry in logged]
    assert all(0 < ratio < 1 for ratio in ratios) and len(set(ratios)) == 4
    assert len(logged[0]) == 8 + 1 + 2  # modules, their mean, step and epoch


def test_training_is_not_disturbed(tmp_path, capsys):
    with_it, without = (
        [entry["loss"] for entry in train(tmp_path, callback).state.log_history if "loss" in entry]
        for callback in (True, False)
    )
    assert with_it == without


@pytest.mark.parametrize(("family", "targets"), [("bert", TARGETS), ("gpt2", ["c_attn"]), ("llama", ["q_proj"])])
def test_it_is_the_ratio_of_the_modules_inputs(family, targets):
    model = make_peft(family, targets).train()
    data = batches(family, 1)
    found = null_space_of_training(model, data)
    name = next(iter(found))
    down = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    shape = model.get_submodule(f"base_model.model.{name}").base_layer.weight.shape
    out = shape[1] if family == "gpt2" else shape[0]
    adapter = Adapter.from_updates({name: LowRank(torch.zeros(out, 3).double(), down.detach().double())})
    expected = measure_null_space(make_model(family), {"a": adapter}, {"t": data})["t"]["a"][name]
    assert found[name] == pytest.approx(expected, abs=SINGLE)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert null_space_ratio(down, down).max() < 1e-2


def test_veras_shared_projection_is_measured():
    torch.manual_seed(3)
    config = VeraConfig(r=3, target_modules=["query", "output.dense"], projection_prng_key=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = get_peft_model(make_model("bert"), config)
    found = null_space_of_training(model, batches("bert", 1))
    down = model.base_model.vera_A["default"].double()
    for name in found:
        inputs = model.get_submodule(f"base_model.model.{name}").in_features
        out = model.get_submodule(f"base_model.model.{name}").out_features
        update = LowRank(torch.zeros(out, 3).double(), down[:, :inputs])
        expected = measure_null_space(
            make_model("bert"), {"a": Adapter.from_updates({name: update})}, {"t": batches("bert", 1)}
        )
        assert found[name] == pytest.approx(expected["t"]["a"][name], abs=SINGLE)


def test_other_layers_are_passed_over():
    found = null_space_of_training(make_peft("bert", ["query", "word_embeddings"]), batches("bert", 1))
    assert len(found) == 4
    with pytest.raises(MismatchError, match="no linear layer"):
        null_space_of_training(make_model("bert"), batches("bert", 1))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremerge.learning.callback", None)
    with pytest.raises(MissingExtraError, match=r"coremerge\[learn\]"):
        coremerge.learning.NullSpaceCallback  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        coremerge.learning.nothing  # noqa: B018
