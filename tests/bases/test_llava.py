"""A LLaVA of two small bases and a projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from coremerge.bases.llava import UNUSED, build
from coremerge.learning.processor import load_processor, parts_of

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", UNUSED]
WORDS = ["user", "assistant", "red", "star", "\n"]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "star"}]}]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of a tiny DINOv2 and a tiny Llama, and a projector of its second hidden states at 28 pixels."""
    torch.manual_seed(0)
    vision, language, projector = tmp_path / "vision", tmp_path / "language", tmp_path / "projector.safetensors"
    Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=56)).save_pretrained(
        vision
    )
    text = LlamaConfig(
        vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(language)
    _tokenizer().save_pretrained(language)
    weights = {"linear_1.weight": torch.randn(12, 8), "linear_2.weight": torch.randn(12, 12)}
    weights |= {"linear_1.bias": torch.randn(12), "linear_2.bias": torch.randn(12)}
    save_file(weights, projector, {"layer": "2", "side": "28"})
    return vision, language, projector


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(MARKERS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", additional_special_tokens=[UNUSED],
    )  # fmt: skip


def _built(sources: tuple[Path, Path, Path], out: Path) -> tuple[Any, Any]:
    out.mkdir()
    build(*sources, out)
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32, local_files_only=True)
    return model.eval(), load_processor(out)


def test_a_picture_goes_in_as_its_patches_projected(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, processor = _built(sources, tmp_path / "llava")
    assert parts_of(processor).image_token == "<image>"
    text = processor.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nstar<|im_end|>\n<|im_start|>assistant\n"
    picture = Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3))
    batch = processor(text=[text], images=[[picture]], return_tensors="pt")
    ids = batch["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 4
    assert model.config.text_config.vocab_size == 16
    with torch.no_grad():
        tower = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[2][:, 1:]
        embedded = model.get_input_embeddings()(ids)
        embedded[ids == 3] = model.model.multi_modal_projector(tower)[0]
        expected = model.lm_head(model.model.language_model(inputs_embeds=embedded).last_hidden_state)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)


def test_both_bases_stay_as_they_are(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, _ = _built(sources, tmp_path / "llava")
    tower = Dinov2Model.from_pretrained(sources[0], local_files_only=True).state_dict()
    assert all(
        torch.equal(model.model.vision_tower.state_dict()[key], value.half().float()) for key, value in tower.items()
    )
    text = LlamaForCausalLM.from_pretrained(sources[1], local_files_only=True).model.state_dict()
    assert all(
        torch.equal(model.model.language_model.state_dict()[key], value.half().float()) for key, value in text.items()
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_projector_says_what_it_reads(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    save_file({"linear_1.weight": torch.zeros(2, 2)}, sources[2])
    with pytest.raises(ValueError, match="lacks layer or side"):
        build(*sources, tmp_path)
