"""Tiny models that answer, each with its processor, a folder of both, and rows to ask it; and how to do so slowly."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlavaProcessor, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers import WhisperProcessor as Whisper

from families import WORDS, make_model
from kinds import PAIR
from made import make_llava, make_tokenizer, picture

CHAT = (
    "{{ bos_token }}{% for m in messages %} <turn> {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %} <turn> assistant {% endif %}"
)
SEEING_CHAT = (
    "{% for m in messages %} {{ m['role'] }} : {% for part in m['content'] %}"
    "{{ ' <image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} [SEP]{% endfor %}"
    "{% if add_generation_prompt %} assistant : {% endif %}"
)
RATE = 16_000


def make_speaker(family: str, folder: Path) -> Path:
    """A model whose answers differ from prompt to prompt, and what turns these into tensors, saved."""
    model = _whisper() if family == "whisper" else make_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.35)
        if (image := getattr(model.config, "image_token_id", None)) is not None:
            model.get_output_embeddings().weight[image] = 0  # an answer with an image's token has no image for it
    model.save_pretrained(folder)
    _processor(family).save_pretrained(folder)
    return folder


def _processor(family: str) -> Any:
    if family == "llava":
        processor: LlavaProcessor = make_llava(SEEING_CHAT)
        return processor
    if family == "whisper":
        tokenizer = _wrapped("<s> <turn> $A </s>")
        return Whisper(WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1), tokenizer)
    return _wrapped("$A </s>") if family == "t5" else make_tokenizer(chat_template=CHAT)


def _wrapped(form: str) -> Any:
    tokenizer = make_tokenizer(pad_token="[PAD]")
    known = [(word, tokenizer.convert_tokens_to_ids(word)) for word in ("<s>", "</s>", "<turn>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=known)
    return tokenizer


def _whisper() -> nn.Module:
    sizes = {"vocab_size": WORDS, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 8}
    torch.manual_seed(0)
    tokens = {"bos_token_id": 4, "eos_token_id": 5, "decoder_start_token_id": 4, "pad_token_id": 0}
    config = WhisperConfig(**PAIR | sizes | tokens, suppress_tokens=None, begin_suppress_tokens=None)
    return WhisperForConditionalGeneration(config).eval()


def rows_for(family: str, folder: Path, count: int = 7) -> list[dict[str, Any]]:
    """Prompts of different lengths, of the kind that the family takes."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        if family == "whisper":
            rows.append({"audio": sound(folder / f"{i}.wav", 300 + 211 * i).name})
            continue
        row = {"words": " ".join(f"w{(3 * i + k) % 37 + 1}" for k in range(1 + i % 4))}
        rows.append(row | ({"image": picture(folder / f"{i}.png", 30 * i).name} if family == "llava" else {}))
    return rows


def sound(path: Path, tone: float, rate: int = RATE, channels: int = 1, size: int = 2) -> Path:
    """Half a second of a tone."""
    samples = np.sin(np.arange(rate // 2) * 2 * np.pi * tone / rate).repeat(channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {1: "u1", 2: "<i2", 4: "<i4"}[size]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, size, rate, 0, "NONE", "not compressed"))
        data = samples * 0.5 * (2 ** (8 * size - 1)) + (128 if size == 1 else 0)
        file.writeframes(data.round().astype(kind).tobytes())
    return path


def slow_answer(model: Any, inputs: dict[str, Any], most: int, stops: Sequence[int]) -> list[int]:
    """Greedy, a row alone, the whole text anew for each token."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    said: list[int] = []
    while len(said) < most:
        found = dict(inputs)
        found[key] = torch.cat([inputs[key], torch.tensor([said], dtype=torch.long)], 1)
        if "attention_mask" in found and key == "input_ids":
            found["attention_mask"] = torch.ones_like(found["input_ids"])
        with torch.no_grad():
            token = int(model(**found, use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        said.append(token)
    return said


def slow_log_likelihood(model: Any, inputs: dict[str, Any], answer: Sequence[int]) -> float:
    """Of an answer's tokens, by all logits."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    found = dict(inputs)
    found[key] = torch.cat([inputs[key], torch.tensor([list(answer)])], 1)
    if "attention_mask" in found and key == "input_ids":
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    with torch.no_grad():
        logits = model(**found, use_cache=False).logits[0].double().log_softmax(-1)
    first = inputs[key].shape[1] - 1
    return sum(float(logits[first + at, token]) for at, token in enumerate(answer))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
