"""Grown, padded and cut vocabularies: the written model is what PEFT computes on a base that was resized likewise."""

import json
import sys
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_ends import FAMILIES, built, logits

import coremerge
from coremerge.errors import MismatchError
from coremerge.formats.into import save_into
from coremerge.formats.vocabulary import with_vocabulary
from test_naming import FAMILIES as NAMED
from test_naming import seeded

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
LLAMA = "LlamaForCausalLM"
SIZES = {"grown": 43, "padded": 64, "cut": 36}


def resized(name, size, **more):
    model = built(name, **more)
    torch.manual_seed(7)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def trained(model, folder, save=True, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (one for one in made.parameters() if one.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made.save_pretrained(folder, save_embedding_layers=save)
    return made.eval()


def check(tmp_path, name, made, size):
    saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    assert loaded.config.get_text_config().vocab_size == size
    torch.testing.assert_close(logits(loaded, name), logits(made, name), rtol=1e-4, atol=1e-5)
    assert f"the vocabulary has {size} tokens now" in " ".join(saved.notes)
    return saved


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
class TestSizes:
    def test_both_ends_trained_whole(self, tmp_path, name, tie, size):
        _, at, out, other, _ = FAMILIES[name]
        built(name, tie_word_embeddings=tie).save_pretrained(tmp_path / "base")
        model = resized(name, size, tie_word_embeddings=tie)
        check(
            tmp_path,
            name,
            trained(model, tmp_path / "A", False, target_modules=[other], modules_to_save=[at, out]),
            size,
        )

    def test_saved_unasked(self, tmp_path, name, tie, size):
        other = FAMILIES[name][3]
        built(name, tie_word_embeddings=tie).save_pretrained(tmp_path / "base")
        made = trained(resized(name, size, tie_word_embeddings=tie), tmp_path / "A", target_modules=[other])
        check(tmp_path, name, made, size)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["tie_word_embeddings"] is tie


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration", "BertForMaskedLM"])
class TestWhatGoesWithTheTables:
    """Biases of single tokens, and the tables of both towers."""

    def test_saved_unasked(self, tmp_path, name):
        built(name).save_pretrained(tmp_path / "base")
        made = trained(resized(name, 43), tmp_path / "A", target_modules=[FAMILIES[name][3]])
        check(tmp_path, name, made, 43)

    def test_without_transformers(self, tmp_path, name, monkeypatch):
        built(name).save_pretrained(tmp_path / "base")
        made = trained(resized(name, 43), tmp_path / "A", target_modules=[FAMILIES[name][3]])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
        loaded = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(logits(loaded, name), logits(made, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Gemma 3", "LLaVA", "Mistral 3"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_tables_of_a_language_model_inside_of_another(tmp_path, family, tie):
    """Whose old files call its output ``language_model.lm_head``."""
    model = seeded(NAMED[family])
    kind, model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = type(model), tie, tie
    kind(model.config).save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(43, mean_resizing=False)
    made = trained(model, tmp_path / "A", target_modules=["q_proj"])
    save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.text_config.vocab_size == 43
    torch.testing.assert_close(logits(loaded, LLAMA), logits(made, LLAMA), rtol=1e-4, atol=1e-5)


class TestRefusals:
    def refused(self, tmp_path, match, model, **settings):
        built(LLAMA, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
        trained(model, tmp_path / "A", False, **settings)
        with pytest.raises(MismatchError, match=match) as raised:
            save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")
        assert "drop" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    def test_one_end_alone(self, tmp_path):
        match = "vocabulary has 40 tokens and the adapter's 43, and the adapter brings no lm_head.weight of that size"
        model = resized(LLAMA, 43, tie_word_embeddings=False)
        self.refused(tmp_path, match, model, target_modules=["q_proj"], modules_to_save=["embed_tokens"])

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_an_update_of_a_table_of_another_size(self, tmp_path, target):
        match = "vocabulary has 40 tokens and the adapter's 43, and .* takes an update.*resize it to 43"
        self.refused(tmp_path, match, resized(LLAMA, 43, tie_word_embeddings=False), target_modules=[target])

    def test_rows_of_new_tokens(self, tmp_path):
        match = "vocabulary has 40 tokens and the adapter's 43, and some of its new tokens' rows"
        rows = {"trainable_token_indices": {"embed_tokens": [40, 42]}}
        self.refused(tmp_path, match, resized(LLAMA, 43, tie_word_embeddings=False), target_modules=["q_proj"], **rows)

    @pytest.mark.parametrize("tie", [True, False])
    def test_rows_of_new_tokens_as_peft_saves_them_unasked(self, tmp_path, tie):
        built(LLAMA, tie_word_embeddings=tie).save_pretrained(tmp_path / "base")
        rows = {"trainable_token_indices": {"embed_tokens": [5, 40]}}  # and the table has 43
        trained(resized(LLAMA, 43, tie_word_embeddings=tie), tmp_path / "A", target_modules=["q_proj"], **rows)
        size = 41 if tie else 43  # tied, no table is read that tells
        with pytest.raises(MismatchError, match=f"the adapter's {size}, and some of its new tokens' rows are read"):
            save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out")


def test_the_other_tensors_are_the_bases(tmp_path):
    built(LLAMA, tie_word_embeddings=False).save_pretrained(tmp_path / "base", max_shard_size="6KB")
    trained(resized(LLAMA, 43, tie_word_embeddings=False), tmp_path / "A", target_modules=["q_proj"])
    saved = save_into(tmp_path / "base", coremerge.load(tmp_path / "A"), tmp_path / "out", dtype="bf16", threads=2)
    tensors = {key: tensor for file in saved.weights for key, tensor in load_file(file).items()}
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape == (43, 16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert saved.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_every_part_of_a_config_that_names_the_vocabulary_changes():
    text = {"vocab_size": 40, "hidden_size": 40}
    config = {"vocab_size": 40, "text_config": text, "vision_config": {"vocab_size": 7}, "audio_config": {"size": 40}}
    assert with_vocabulary(config, 40, 43) == {"vocab_size": 43, "text_config": {"vocab_size": 43, "hidden_size": 40}}
    assert with_vocabulary({"n_words": 40, "hidden_size": 40}, 40, 43) == {"n_words": 43}
    assert with_vocabulary({"vocab_size": 41}, 40, 43) == {}
