"""The null-space ratio while PEFT trains with the Trainer."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import coremerge.learning
from coremerge import Adapter, LowRank, load
from coremerge.errors import InputError, MismatchError, MissingExtraError
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


def uneven():
    """Batches of several sizes, padded to several lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[7, 2], [3, 3, 3, 1], [1]]
    masks = [torch.arange(max(row)) < torch.tensor(row).unsqueeze(1) for row in lengths]
    return [
        {"input_ids": torch.randint(1, 49, mask.shape, generator=generator), "attention_mask": mask.long()}
        for mask in masks
    ]


@pytest.mark.parametrize(
    ("family", "targets"), [("bert", TARGETS), ("llama", ["q_proj", "down_proj"]), ("t5", ["q", "v"])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_the_measure_give_one_number(family, targets, dtype, tmp_path):
    """The mean over tokens that count, however they are shared out among batches; with the adapter in the model."""
    model = make_peft(family, targets).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path)
    found = null_space_of_training(model, uneven())
    table = measure_null_space(
        make_model(family).to(dtype), {"a": load(tmp_path)}, {"t": uneven()}, weights={"a": 1.0}
    )["t"]["a"]
    assert found.keys() == table.keys() and len(found) >= 8
    # the update is added in another order of operations: that is a rounding of the activations' own dtype
    assert found == pytest.approx(table, abs=1e-5 if dtype == torch.float32 else 1e-2)
    first = next(name for name in found if ".0." in name)
    assert found[first] == pytest.approx(table[first], abs=1e-6)  # nothing is added before it
    single = [{key: value[i : i + 1] for key, value in b.items()} for b in uneven() for i in range(len(b["input_ids"]))]
    assert null_space_of_training(model, single)[first] == pytest.approx(found[first], abs=1e-5)


def test_what_is_padding_does_not_count():
    model, longer = make_peft(), uneven()
    padded = [{k: torch.cat([v, torch.zeros_like(v)], 1) for k, v in b.items()} for b in longer]
    one, other = null_space_of_training(model, longer), null_space_of_training(model, padded)
    assert one == pytest.approx(other, abs=1e-5)


def test_modules_that_no_input_reaches():
    model = make_peft("llava", ["q_proj"])
    found = null_space_of_training(model, batches("bert", 1))
    assert found and not any("vision" in name for name in found)
    with pytest.raises(InputError, match="reach no module that has a LoRA"):
        null_space_of_training(make_peft("llava", r".*vision.*q_proj"), batches("bert", 1))


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
    with pytest.raises(MissingExtraError, match=r"pip install .*\[learn\]"):
        coremerge.learning.NullSpaceCallback  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        coremerge.learning.nothing  # noqa: B018
