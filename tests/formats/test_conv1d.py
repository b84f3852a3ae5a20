"""The layout belongs to the base: checked against PEFT's own merge, whatever the adapters' configs say."""

import json
import warnings
from typing import ClassVar

import peft
import pytest
import torch
import transformers
from layers import adapter
from safetensors.torch import load_file, save_file

import coremerge
from coremerge.adapter import Info, Module
from coremerge.errors import MismatchError
from coremerge.formats.into import save_into
from coremerge.pipeline import merge_files
from coremerge.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

SMALL = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
IDS = {"bos_token_id": 0, "eos_token_id": 0}
TARGETS = [["attn.c_proj"], ["c_attn"], ["c_fc"], ["c_attn", "c_proj", "c_fc"], ["attn.c_proj", "lm_head"]]
SUM = Recipe(method="sum", scale=1, steps=())


def gpt2(**settings):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SMALL, **IDS, **{"tie_word_embeddings": False, **settings})
    return transformers.GPT2LMHeadModel(config).eval()


def openai_gpt(**settings):
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(**SMALL, **IDS, tie_word_embeddings=False, **settings)
    return transformers.OpenAIGPTLMHeadModel(config).eval()


def bigcode(**settings):
    """Named as GPT-2, built of plain layers."""
    torch.manual_seed(0)
    config = transformers.GPTBigCodeConfig(**SMALL, **IDS, tie_word_embeddings=False, **settings)
    return transformers.GPTBigCodeForCausalLM(config).eval()


def trained(model, folder, targets, names=("default",)):
    """A PEFT model with one or more adapters, trained differently and saved; more than one go into subfolders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets))
            if name == names[0]:
                model = peft.get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def merged(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            key: tensor
            for key, tensor in model.merge_and_unload().state_dict().items()
            if not key.endswith(".attn.bias")
        }


def flag(folder):
    return json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


def set_flag(folder, value):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": value}))


def same(folder, expected):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", [gpt2, openai_gpt, bigcode])
def test_a_base_takes_what_pefts_own_merge_gives_it(tmp_path, kind, targets, said):
    kind().save_pretrained(tmp_path / "base")
    model = trained(kind(), tmp_path / "A", targets)
    set_flag(tmp_path / "A", said)
    save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    same(tmp_path / "out", merged(model))


@pytest.mark.parametrize("said", [False, True])
def test_square_in_every_layer(tmp_path, said):
    gpt2(n_inner=16).save_pretrained(tmp_path / "base")
    model = trained(gpt2(n_inner=16), tmp_path / "A", ["mlp.c_proj", "c_fc"])
    set_flag(tmp_path / "A", said)
    save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    same(tmp_path / "out", merged(model))


@pytest.mark.parametrize("targets", TARGETS)
def test_the_second_adapter_of_a_model_says_false_and_merges_with_the_first(tmp_path, targets):
    gpt2().save_pretrained(tmp_path / "base")
    model = trained(gpt2(), tmp_path / "A", targets, ["one", "two"])
    folders = [tmp_path / "A" / name for name in ("one", "two")]
    assert not flag(folders[1])
    result = merge_files(folders, tmp_path / "out", SUM, into=tmp_path / "base")
    model.base_model.set_adapter(["one", "two"])
    same(tmp_path / "out", merged(model))
    alone = merge_files(folders[1:], tmp_path / "alone", SUM, into=tmp_path / "base")
    model = trained(gpt2(), tmp_path / "B", targets, ["one", "two"])
    model.set_adapter("two")
    same(alone.saved.path, merged(model))
    said = "fan_in_fan_out is true in some adapters only" in " ".join(result.plan.warnings)
    assert said == flag(folders[0])


def test_the_merged_adapter_says_true_and_peft_computes_the_sum(tmp_path):
    model = trained(gpt2(), tmp_path / "A", ["c_attn", "c_proj"], ["one", "two"])
    folders = [tmp_path / "A" / name for name in ("two", "one")]
    merge_files(folders, tmp_path / "out", SUM)
    assert flag(tmp_path / "out") is True
    ids = torch.tensor([[1, 5, 7, 2]])
    model.base_model.set_adapter(["one", "two"])
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


class TestOtherModels:
    """What no config tells, the biases do."""

    TENSORS: ClassVar = {
        "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,),
        "h.0.attn.c_proj.weight": (4, 4), "h.0.attn.c_proj.bias": (4,),
        "v.0.attn.qkv.weight": (12, 4), "v.0.attn.qkv.bias": (12,),
        "v.0.attn.proj.weight": (4, 4), "v.0.attn.proj.bias": (4,),
    }  # fmt: skip

    def base(self, tmp_path, config):
        (tmp_path / "base").mkdir()
        save_file({key: torch.zeros(shape) for key, shape in self.TENSORS.items()}, tmp_path / "base/model.safetensors")
        (tmp_path / "base/config.json").write_text(json.dumps(config))
        return tmp_path / "base"

    @pytest.mark.parametrize("said", [False, True])
    @pytest.mark.parametrize("config", [{}, {"model_type": "jais"}, {"decoder": {"model_type": "gpt2"}}])
    def test_a_square_weight_is_like_the_one_beside_it(self, tmp_path, config, said):
        names = [key.removesuffix(".weight") for key in self.TENSORS if key.endswith("weight")]
        shapes = dict(zip(names, [(12, 4), (4, 4), (12, 4), (4, 4)], strict=True))
        for at, (name, shape) in enumerate(shapes.items()):
            made = adapter({name: Module(shape, 2)}, info=Info(fan_in_fan_out=said))
            (tmp_path / str(at)).mkdir()
            base = self.base(tmp_path / str(at), config)
            save_into(base, made, tmp_path / str(at) / "out")
            found = load_file(tmp_path / str(at) / "out/model.safetensors")[f"{name}.weight"]
            dense = made[name].dense().float()
            torch.testing.assert_close(found, dense.mT if name.startswith("h") else dense)

    @pytest.mark.parametrize(("type_", "turned"), [(None, True), ("llama", False)])
    def test_where_nothing_tells_the_flag_counts_unless_the_model_is_known(self, tmp_path, type_, turned):
        (tmp_path / "base").mkdir()
        save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "base/model.safetensors")
        (tmp_path / "base/config.json").write_text(json.dumps({"model_type": type_}))
        made = adapter({"a": Module((4, 4), 2)}, info=Info(fan_in_fan_out=True))
        save_into(tmp_path / "base", made, tmp_path / "out")
        dense = made["a"].dense().float()
        torch.testing.assert_close(
            load_file(tmp_path / "out/model.safetensors")["a.weight"], dense.mT if turned else dense
        )

    def test_a_turned_shape_that_nothing_speaks_for_is_another_base(self, tmp_path):
        (tmp_path / "base").mkdir()
        save_file({"a.weight": torch.zeros(4, 6)}, tmp_path / "base/model.safetensors")
        made = adapter({"a": Module((6, 4), 2)})
        with pytest.raises(MismatchError, match=r"a\.weight: the base's weight is \[4, 6\]"):
            save_into(tmp_path / "base", made, tmp_path / "out")
        made = adapter({"a": Module((6, 4), 2)}, info=Info(fan_in_fan_out=True))
        save_into(tmp_path / "base", made, tmp_path / "out")
        found = load_file(tmp_path / "out/model.safetensors")["a.weight"]
        torch.testing.assert_close(found, made["a"].dense().mT.float())
