"""Tiny real models of every family, made offline, with adapters that PEFT wrote for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from coremerge import Adapter, load

WORDS, WIDTH, IMAGE = 50, 16, 49
"""Size of the vocabulary, of hidden states, and the token that stands for an image patch."""


@dataclass(frozen=True)
class Family:
    """How one kind of model is made, fed and adapted."""

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    targets: list[str]


def text(generator: torch.Generator, rows: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    """Random tokens; all rows but the first are padded."""
    ids = torch.randint(1, IMAGE, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1:, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(generator: torch.Generator, rows: int = 2) -> dict[str, Tensor]:
    """Random images of 2 × 2 patches."""
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


def both(generator: torch.Generator) -> dict[str, Tensor]:
    """Texts with an image each."""
    batch = text(generator, 2, 9)
    batch["input_ids"][:, 1:5] = IMAGE
    return batch | image(generator)


def _vision(kind: type) -> Any:
    return kind(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip


FAMILIES = {
    "bert": Family(
        lambda: BertForSequenceClassification(
            BertConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                intermediate_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
        ),
        text,
        ["query", "value", "attention.output.dense"],
    ),
    "vit": Family(lambda: ViTForImageClassification(_vision(ViTConfig)), image, ["q_proj", "v_proj", "query", "value"]),
    "clip": Family(lambda: CLIPVisionModel(_vision(CLIPVisionConfig)), image, ["q_proj", "v_proj", "fc1"]),
    "llama": Family(lambda: LlamaForCausalLM(_llama()), text, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": Family(
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=WORDS, n_embd=WIDTH, n_layer=4, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
            )
        ),
        text,
        ["c_attn", "c_proj"],
    ),
    "t5": Family(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=4, num_heads=2)
        ),
        text,
        ["q", "v"],
    ),
    "llava": Family(
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=_vision(CLIPVisionConfig), text_config=_llama(), image_token_id=IMAGE, image_seq_length=4
            )
        ),
        both,
        ["q_proj", "v_proj"],
    ),
}


def make_model(family: str) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    model: nn.Module = FAMILIES[family].make()
    return model.eval()


def make_adapter(family: str, folder: Path, seed: int, rank: int = 3, **settings: Any) -> Adapter:
    """An adapter of random factors, saved by PEFT."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=FAMILIES[family].targets, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = get_peft_model(FAMILIES[family].make(), config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        model.save_pretrained(folder)
    return load(folder)


def batches(family: str, count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [FAMILIES[family].batch(generator) for _ in range(count)]
