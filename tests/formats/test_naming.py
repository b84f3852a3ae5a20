"""Bases whose files name their tensors otherwise than the modules of the model are named."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from layers import adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models import step3p7

import coremerge
from coremerge.adapter import Info, Module
from coremerge.errors import MismatchError, UnsupportedError
from coremerge.formats import naming
from coremerge.formats.into import plan_into, save_into

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}


def joined(name, text, vision, **settings):
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": text}, vision_config={**VISION, "model_type": vision}, **settings
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def llava():
    return joined("Llava", "llama", "clip_vision_model", image_token_index=39)


def qwen2_5_vl():
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": MROPE},
            vision_config={**vision, "patch_size": 14, "fullatt_block_indexes": [0]},
        )
    )


def mllama():
    vision = {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            text_config={**TEXT, "cross_attention_layers": [1]}, vision_config={**VISION, **vision}
        )
    )


def encoder(name, head="Model", **settings):
    return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**VISION, **settings))


def step():
    config = step3p7.configuration_step3p7.Step3p7VisionConfig(**VISION, max_position_embeddings=4)
    return step3p7.modeling_step3p7.Step3p7VisionModel(config)


FAMILIES = {
    "LLaVA": llava,
    "Gemma 3": lambda: joined("Gemma3", "gemma3_text", "siglip_vision_model", mm_tokens_per_image=1),
    "PaliGemma": lambda: joined("PaliGemma", "gemma", "siglip_vision_model", projection_dim=16),
    "Mistral 3": lambda: joined("Mistral3", "mistral", "pixtral"),
    "Qwen2.5-VL": qwen2_5_vl,
    "Mllama": mllama,
    "ViT": lambda: encoder("ViT", "ForImageClassification"),
    "BEiT": lambda: encoder("Beit", "ForImageClassification"),
    "DINOv2, gate and up fused": lambda: encoder("Dinov2", use_swiglu_ffn=True),
    "Step, query, key and value fused and permuted": step,
}
HEADS = ("lm_head", "classifier")


def seeded(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def linear(model):
    return [n for n, x in model.named_modules() if isinstance(x, nn.Linear) and not n.endswith(HEADS)]


def trained(model, folder, targets, **settings):
    """A PEFT model with random updates, saved, and the parameters of PEFT's own merge."""
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return merged(peft)


def merged(peft):
    return {name: value.clone() for name, value in peft.merge_and_unload().state_dict().items()}


def renamed(folder, changes):
    """The tensors of ``folder`` under other names."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for old, new in changes.items():
            tensors = {re.sub(old, new, key): tensor for key, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


def same(kind, out, expected):
    found = kind.from_pretrained(out, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)  # float32's own rounding


OLD_CLIP = {r"^vision_tower\.(?!vision_model)": "vision_tower.vision_model."}
OLD_TEXT = {
    r"model\.language_model\.": "language_model.model.",
    r"model\.vision_tower\.": "vision_tower.vision_model.",
    r"model\.multi_modal": "multi_modal",
}


class TestTransformersMapping:
    @pytest.mark.parametrize("original", [True, False], ids=["names of files", "names of modules"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_comes_out_as_peft_merges_it(self, tmp_path, family, original):
        model = seeded(FAMILIES[family])
        kind = type(model)
        model.save_pretrained(tmp_path / "base", save_original_format=original)
        model = kind.from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", linear(model))
        saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(kind, tmp_path / "out", expected)
        assert [kind.__name__ in note for note in saved.notes] == [True] * original
        before, after = (load_file(tmp_path / f / "model.safetensors").keys() for f in ("base", "out"))
        assert before == after

    def test_hub_files_with_a_level_more_in_the_vision_tower(self, tmp_path):
        model = seeded(llava)
        model.save_pretrained(tmp_path / "base")
        renamed(tmp_path / "base", OLD_CLIP)
        model = type(model).from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", ["q_proj", "fc1", "linear_1"])
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", expected)

    @pytest.mark.parametrize("original", [True, False], ids=["names of files", "names of modules"])
    def test_an_adapter_of_an_older_transformers(self, tmp_path, original):
        model = seeded(llava)
        model.save_pretrained(tmp_path / "base", save_original_format=original)
        trained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "a", ["q_proj", "fc1"])
        renamed(tmp_path / "a", OLD_TEXT)
        peft = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "a")
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", merged(peft))

    def test_a_head_on_a_base_without_one(self, tmp_path):
        seeded(lambda: encoder("ViT")).save_pretrained(tmp_path / "base")
        kind = transformers.ViTForImageClassification
        model = kind.from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", ["q_proj", "fc2"], modules_to_save=["classifier"])
        saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        assert "added, for the base has no such tensor: classifier.bias, classifier.weight" in saved.notes[1]
        found = kind.from_pretrained(tmp_path / "out").state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)

    def test_whole_modules_take_the_place_of_renamed_ones(self, tmp_path):
        model = seeded(llava)
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        saved = {"modules_to_save": ["lm_head", "multi_modal_projector"]}
        expected = trained(model, tmp_path / "a", ["v_proj"], **saved)
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", expected)

    def test_whole_modules_are_found_where_the_adapted_ones_are_named_alike(self, tmp_path):
        model = seeded(lambda: encoder("Dinov2"))
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", ["fc1"], modules_to_save=["o_proj"])
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", expected)

    def test_one_tower_of_two_that_are_alike(self, tmp_path):
        sides = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
        seeded(lambda: transformers.CLIPModel(transformers.CLIPConfig(**sides))).save_pretrained(tmp_path / "base")
        kind = transformers.CLIPVisionModel
        model = kind.from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", ["q_proj", "fc1"])
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(kind, tmp_path / "out", expected)

    def test_what_is_missing_is_told_as_transformers_names_it(self, tmp_path):
        seeded(FAMILIES["ViT"]).save_pretrained(tmp_path / "base")
        made = adapter(dict.fromkeys(["layers.0.attention.q_proj", "pooler.dense"], Module((16, 16), 1)))
        with pytest.raises(MismatchError, match=r"no weight for module pooler\.dense"):
            plan_into(tmp_path / "base", made)


class TestStacks:
    """Weights that transformers makes out of tensors of another shape."""

    @pytest.fixture
    def base(self, tmp_path):
        config = transformers.MixtralConfig(**TEXT, num_local_experts=2)
        seeded(lambda: transformers.MixtralForCausalLM(config)).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def test_an_update_of_a_stack_is_refused_by_name(self, base):
        module = "model.layers.1.mlp.experts.down_proj"
        made = adapter({module: Module((16, 24), 1)})
        with pytest.raises(UnsupportedError, match=re.escape(module)):
            plan_into(base, made)

    def test_a_whole_stack_is_refused_by_name(self, base):
        name = "model.layers.1.mlp.experts.down_proj"
        made = adapter({"model.layers.1.self_attn.q_proj": Module((16, 16), 1)}, extras={name: torch.ones(2, 16, 24)})
        with pytest.raises(UnsupportedError, match=re.escape(name)):
            plan_into(base, made)

    @pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
    def test_one_expert_at_a_time_is_placed(self, base, tmp_path, block):
        made = adapter({f"model.layers.1.{block}.experts.1.w2": Module((16, 24), 1)})
        save_into(base, made, tmp_path / "out")
        before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
        (changed,) = (key for key in before if not torch.equal(before[key], after[key]))
        assert changed == "model.layers.1.block_sparse_moe.experts.1.w2.weight"
        torch.testing.assert_close(after[changed] - before[changed], next(iter(made.values())).dense().float())

    @pytest.mark.parametrize("shape", [(48, 15), (47, 16), (49, 16), (96, 16)])
    def test_rows_of_a_fused_weight_must_fit(self, tmp_path, shape):
        seeded(lambda: encoder("Dinov2", use_swiglu_ffn=True)).save_pretrained(tmp_path / "base")
        made = adapter({"encoder.layer.0.mlp.up_proj": Module(shape, 1)})
        with pytest.raises(MismatchError, match=r"weights_in\.weight"):
            plan_into(tmp_path / "base", made)

    def test_a_fused_weight_cannot_be_changed_whole_and_by_rows(self, tmp_path):
        seeded(lambda: encoder("Dinov2", use_swiglu_ffn=True)).save_pretrained(tmp_path / "base")
        made = adapter(
            {
                "encoder.layer.0.mlp.up_proj": Module((48, 16), 1),
                "encoder.layer.0.mlp.weights_in": Module((96, 16), 1),
            }
        )
        with pytest.raises(MismatchError, match="two modules of the adapter are this one weight"):
            plan_into(tmp_path / "base", made)


@pytest.fixture
def alone(monkeypatch):
    """Without transformers."""
    monkeypatch.setattr(naming, "find_spec", lambda name: None)


@pytest.mark.usefixtures("alone")
class TestTowers:
    """Without transformers: one prefix for all of a tower."""

    @pytest.mark.parametrize("family", ["LLaVA", "Gemma 3", "Mistral 3", "Qwen2.5-VL", "Mllama"])
    def test_each_tower_has_its_prefix(self, tmp_path, family):
        model = seeded(FAMILIES[family])
        model.save_pretrained(tmp_path / "base")
        if family in ("LLaVA", "Gemma 3"):
            renamed(tmp_path / "base", OLD_CLIP)
        model = type(model).from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", linear(model))
        saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", expected)
        assert "model.language_model. is" in saved.notes[0]

    def test_a_whole_module_outside_of_the_towers(self, tmp_path):
        model = seeded(llava)
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        expected = trained(model, tmp_path / "a", ["v_proj"], modules_to_save=["lm_head"])
        save_into(tmp_path / "base", coremerge.load(tmp_path / "a"), tmp_path / "out")
        same(type(model), tmp_path / "out", expected)

    def test_names_that_differ_within_a_tower_are_refused_with_what_helps(self, tmp_path):
        seeded(FAMILIES["ViT"]).save_pretrained(tmp_path / "base")
        made = adapter({"vit.layers.0.attention.q_proj": Module((16, 16), 1)})
        with pytest.raises(MismatchError, match="install transformers 5"):
            plan_into(tmp_path / "base", made)

    @pytest.mark.parametrize(
        "towers",
        [("language_model.model.", "vision_tower."), ("visual.",)],
        ids=["two that fit alike", "one of another kind"],
    )
    def test_a_tower_is_not_guessed(self, tmp_path, towers):
        (tmp_path / "base").mkdir()
        tensors = {f"{tower}layers.0.self_attn.q_proj.weight": torch.ones(4, 4) for tower in towers}
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        made = adapter({"text.decoder.layers.0.self_attn.q_proj": Module((4, 4), 1)})
        with pytest.raises(MismatchError, match="no weight for module"):
            plan_into(tmp_path / "base", made)


class TestWhatIsAsked:
    def test_transformers_is_left_alone_where_the_names_are_the_same(self, tmp_path):
        tensors = {"model.layers.0.q_proj.weight": torch.ones(3, 2)}
        (tmp_path / "base").mkdir()
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
        script = """
import sys, torch, coremerge
from coremerge.formats.into import save_into
from coremerge.adapter import Adapter
from coremerge.lowrank import LowRank
update = LowRank(torch.ones(3, 1), torch.ones(1, 2))
save_into(sys.argv[1], Adapter.from_updates({"model.layers.0.q_proj": update}), sys.argv[2])
assert "transformers" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", script, tmp_path / "base", tmp_path / "out"], check=True)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "unheard_of"},
            {"model_type": "vit", "hidden_size": "wide"},
            {"model_type": "vit", "num_hidden_layers": 10**9},
            {"model_type": "vit", "architectures": ["Nowhere", 3, "PreTrainedModel", "logging"]},
            {"model_type": ["vit"]},
        ],
        ids=str,
    )
    def test_a_config_that_says_nothing_of_use_is_no_trouble(self, tmp_path, config):
        (tmp_path / "base").mkdir()
        save_file({"a.b.weight": torch.ones(3, 2)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(MismatchError, match=r"no weight for module x\.y"):
            plan_into(tmp_path / "base", adapter({"x.y": Module((3, 2), 1)}))

    def test_the_class_of_the_adapter_counts_too(self, tmp_path):
        seeded(lambda: encoder("ViT", "ForImageClassification")).save_pretrained(tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        for said in (["ViTForImageClassification"], None):
            (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": said}))
            info = Info(auto_mapping={"base_model_class": "ViTForImageClassification"})
            made = adapter({"vit.layers.0.attention.q_proj": Module((16, 16), 1)}, info=info)
            edits = plan_into(tmp_path / "base", made).placement.edits
            assert list(edits) == ["vit.encoder.layer.0.attention.attention.query.weight"]

    def test_two_names_for_one_weight_are_refused(self, tmp_path):
        seeded(llava).save_pretrained(tmp_path / "base")
        ends = "layers.0.self_attn.q_proj"
        names = [f"model.language_model.{ends}", f"language_model.model.{ends}"]
        with pytest.raises(MismatchError, match="two modules of the adapter are this one weight"):
            plan_into(tmp_path / "base", adapter(dict.fromkeys(names, Module((16, 16), 1))))
        shutil.rmtree(tmp_path / "base")
