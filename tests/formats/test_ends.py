"""Tied weights: whatever an adapter does to either end, the written model computes what PEFT computes."""

import json
import sys
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import coremerge
from coremerge.formats.into import save_into
from test_naming import llava, seeded

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIR = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8}
TOKENS = torch.tensor([[1, 5, 7, 3, 33, 2]])
SPEECH = {"input_features": torch.linspace(-1, 1, 80 * 60).reshape(1, 80, 60)}
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}

# class → its config, its input, output and another layer, what it reads
FAMILIES = {
    "LlamaForCausalLM": (SMALL, "embed_tokens", "lm_head", "q_proj", {"input_ids": TOKENS}),
    "GPT2LMHeadModel": (SMALL, "wte", "lm_head", "c_fc", {"input_ids": TOKENS}),
    "GPTNeoXForCausalLM": (SMALL, "embed_in", "lm_head", "query_key_value", {"input_ids": TOKENS}),
    "GPTNeoXJapaneseForCausalLM": (SMALL, "embed_in", "embed_out", "query_key_value", {"input_ids": TOKENS}),
    "OPTForCausalLM": (
        SMALL | {"word_embed_proj_dim": 16, "ffn_dim": 24},
        "embed_tokens", "lm_head", "q_proj", {"input_ids": TOKENS},
    ),
    "BertForMaskedLM": (SMALL, "word_embeddings", "cls.predictions.decoder", "query", {"input_ids": TOKENS}),
    "WhisperForConditionalGeneration": (
        PAIR | {"max_source_positions": 30}, "decoder.embed_tokens", "proj_out", "q_proj",
        SPEECH | {"decoder_input_ids": TOKENS},
    ),
    "BartForConditionalGeneration": (PAIR, "shared", "lm_head", "q_proj", BOTH),
    "T5ForConditionalGeneration": (T5, "shared", "lm_head", "q", BOTH),
    "SwitchTransformersForConditionalGeneration": (
        T5 | {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}, "shared", "lm_head", "q", BOTH,
    ),
}  # fmt: skip


def built(name, **more):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kind.config_class(**FAMILIES[name][0], **IDS, **{"tie_word_embeddings": True, **more})
    return kind(config).eval()


def trained(model, folder, save=False, **settings):
    """A PEFT model with random values, and its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad or "trainable_tokens_delta" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made.save_pretrained(folder, save_embedding_layers=save)
    return made.eval()


def logits(model, name):
    with torch.no_grad():
        return model(**FAMILIES[name][4]).logits


def same_as_peft(tmp_path, name, base=None, **settings):
    made = trained(built(name) if base is None else base, tmp_path / "A", **settings)
    saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    expected = logits(made, name)
    torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-4, atol=1e-5)
    before = logits(getattr(transformers, name).from_pretrained(tmp_path / "base").eval(), name)
    return saved, float((expected - before).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def both(self, name):
        _, at, out, other, _ = FAMILIES[name]
        return at, out, other

    @pytest.fixture(autouse=True)
    def base(self, tmp_path, name):
        built(name).save_pretrained(tmp_path / "base")

    def test_lora_on_the_input(self, tmp_path, name):
        at, _, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other, at])

    def test_lora_on_the_output(self, tmp_path, name):
        _, out, other = self.both(name)
        assert same_as_peft(tmp_path, name, target_modules=[other, out])[1] > 0.05

    def test_lora_on_the_output_alone(self, tmp_path, name):
        assert same_as_peft(tmp_path, name, target_modules=[self.both(name)[1]])[1] > 0.05

    def test_lora_on_both(self, tmp_path, name):
        at, out, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other, at, out])

    def test_the_input_trained_whole(self, tmp_path, name):
        at, _, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other], modules_to_save=[at])

    def test_the_output_trained_whole(self, tmp_path, name):
        _, out, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other], modules_to_save=[out])

    def test_both_trained_whole(self, tmp_path, name):
        at, out, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other], modules_to_save=[at, out])

    def test_token_rows(self, tmp_path, name):
        at, _, other = self.both(name)
        same_as_peft(tmp_path, name, target_modules=[other], trainable_token_indices={at: [5, 3]})

    def test_without_transformers_names_tell(self, tmp_path, name, monkeypatch):
        at, out, other = self.both(name)
        made = [
            trained(built(name), tmp_path / "0", target_modules=[other, out]),
            trained(built(name), tmp_path / "1", target_modules=[other], modules_to_save=[at]),
        ]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            for count in range(2):
                save_into(tmp_path / "base", coremerge.load(tmp_path / str(count)), tmp_path / f"out{count}")
        for count, model in enumerate(made):
            loaded = getattr(transformers, name).from_pretrained(tmp_path / f"out{count}").eval()
            torch.testing.assert_close(logits(loaded, name), logits(model, name), rtol=1e-4, atol=1e-5)


def pair():
    """An encoder and a decoder put together."""
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**SMALL), transformers.GPT2Config(**SMALL, **IDS, add_cross_attention=True)
    )
    return transformers.EncoderDecoderModel(config)


def small(name, **more):
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SMALL, pad_token_id=0, **more))


NAMELESS = {
    "a pair": (pair, "wte", BOTH),
    "ALBERT": (lambda: small("AlbertForMaskedLM", embedding_size=16), "word_embeddings", {"input_ids": TOKENS}),
    "ELECTRA": (lambda: small("ElectraForMaskedLM", embedding_size=16), "word_embeddings", {"input_ids": TOKENS}),
    "ModernBERT": (
        lambda: small("ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2), "tok_embeddings",
        {"input_ids": TOKENS},
    ),
    "Mamba": (lambda: small("MambaForCausalLM", state_size=4, time_step_rank=2), "embeddings", {"input_ids": TOKENS}),
    "XLM": (
        lambda: small("XLMWithLMHeadModel", emb_dim=16, n_layers=1, n_heads=2), "embeddings", {"input_ids": TOKENS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings", ["lora", "save"])
@pytest.mark.parametrize("family", NAMELESS)
def test_an_output_that_no_file_names_is_found_without_transformers(tmp_path, monkeypatch, family, settings):
    """By its bias, by what is beside it, or inside of the decoder."""
    make, at, inputs = NAMELESS[family]
    base = seeded(make)
    base.save_pretrained(tmp_path / "base")
    other = next(name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear))
    given = {"lora": {"target_modules": [at]}, "save": {"target_modules": [other], "modules_to_save": [at]}}
    made = trained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "A", **given[settings])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    loaded = type(base).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, made(**inputs).logits, rtol=1e-4, atol=1e-5)


class TestOthers:
    def test_a_file_without_the_prefix(self, tmp_path):
        built("GPT2LMHeadModel").transformer.save_pretrained(tmp_path / "base")
        for count, more in enumerate(({"target_modules": ["c_fc", "lm_head"]}, {"modules_to_save": ["wte"]})):
            settings = {"target_modules": ["c_fc"], "task_type": "CAUSAL_LM", **more}
            made = trained(built("GPT2LMHeadModel"), tmp_path / f"A{count}", **settings)
            save_into(tmp_path / "base", coremerge.load(tmp_path / f"A{count}"), tmp_path / f"out{count}")
            loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"out{count}").eval()
            expected = logits(made, "GPT2LMHeadModel")
            torch.testing.assert_close(logits(loaded, "GPT2LMHeadModel"), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["save", "lora", "rows"])
    def test_adapters_that_pefts_option_tied(self, tmp_path, kind):
        name = "LlamaForCausalLM"
        built(name).save_pretrained(tmp_path / "base")
        settings = {
            "save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "lora": {"target_modules": ["q_proj", "embed_tokens"]},
            "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3]}},
        }[kind]
        same_as_peft(tmp_path, name, ensure_weight_tying=True, **settings)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["tie_word_embeddings"] is (kind != "lora")

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration"])
    def test_token_rows_that_peft_saved_for_both_ends(self, tmp_path, name):
        _, at, _, other, _ = FAMILIES[name]
        built(name).save_pretrained(tmp_path / "base")
        rows = {"target_modules": [other], "trainable_token_indices": {at: [5, 3]}}
        made = trained(built(name), tmp_path / "A", save=True, **rows)
        assert any("lm_head.token_adapter" in key for key in load_file(tmp_path / "A/adapter_model.safetensors"))
        save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
        loaded = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(loaded, name), logits(made, name), rtol=1e-4, atol=1e-5)

    def test_a_copy_of_the_output_under_an_older_name(self, tmp_path, monkeypatch):
        model = seeded(llava)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        kind, config = type(model), model.config
        kind(config).save_pretrained(tmp_path / "base")
        file = tmp_path / "base/model.safetensors"
        tensors = load_file(file)
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        made = trained(kind.from_pretrained(tmp_path / "base"), tmp_path / "A", target_modules=["lm_head"])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
        loaded = kind.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(
            logits(loaded, "LlamaForCausalLM"), logits(made, "LlamaForCausalLM"), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("kind", ["alone", "lora", "save"])
    def test_an_output_that_the_files_call_by_its_older_name(self, tmp_path, monkeypatch, kind, known):
        name = "GPTNeoXForCausalLM"
        settings = {
            "alone": {"target_modules": ["lm_head"]},
            "lora": {"target_modules": ["query_key_value", "lm_head"]},
            "save": {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
        }[kind]
        built(name, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
        assert "embed_out.weight" in load_file(tmp_path / "base/model.safetensors")
        made = trained(built(name, tie_word_embeddings=False), tmp_path / "A", **settings)
        with monkeypatch.context() as patch:
            if not known:
                patch.setitem(sys.modules, "transformers", None)
            save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
        loaded = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(loaded, name), logits(made, name), rtol=1e-4, atol=1e-5)

    def test_ends_that_stay_one_stay_tied(self, tmp_path):
        name = "LlamaForCausalLM"
        built(name).save_pretrained(tmp_path / "base")
        saved, _ = same_as_peft(tmp_path, name, target_modules=["q_proj", "v_proj"])
        assert saved.notes == ()
        assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()

    def test_what_was_untied_is_said(self, tmp_path):
        name = "LlamaForCausalLM"
        built(name).save_pretrained(tmp_path / "base")
        saved, _ = same_as_peft(tmp_path, name, target_modules=["q_proj", "lm_head"])
        assert "no longer tied, and written on its own: lm_head.weight" in saved.notes
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False

    def test_a_model_that_scales_by_the_flag_keeps_it(self, tmp_path):
        name = "SwitchTransformersForConditionalGeneration"
        built(name).save_pretrained(tmp_path / "base")
        saved, _ = same_as_peft(tmp_path, name, target_modules=["q", "lm_head"])
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
        assert "no longer tied" in " ".join(saved.notes) and "switched off" not in " ".join(saved.notes)

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_an_output_of_its_own_in_shards_and_another_dtype(self, tmp_path, dtype):
        name = "LlamaForCausalLM"
        built(name).save_pretrained(tmp_path / "base", max_shard_size="6KB")
        made = trained(built(name), tmp_path / "A", target_modules=["q_proj", "lm_head"])
        saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out", dtype=dtype, threads=3)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
        assert index["metadata"]["total_size"] == saved.bytes
        assert saved.dtype == (torch.bfloat16 if dtype else torch.float32)
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        close = {"rtol": 0.1, "atol": 0.1} if dtype else {"rtol": 1e-4, "atol": 1e-5}  # bfloat16 has 8 bits
        torch.testing.assert_close(logits(loaded, name), logits(made, name), **close)
