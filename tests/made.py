"""Inputs and processors that the tests make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from families import WORDS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "<turn>", "user", "assistant", ":"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(WORDS - 1 - len(SPECIAL))), "<image>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %} <turn> {{ m['role'] }} {{ m['content'] | trim }} </s>{% endfor %}"
OF_PARTS = (
    "{% for m in messages %} {{ m['role'] }} : {% for part in m['content'] if part is mapping %}"
    "{{ ' <image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} </s>{% endfor %}"
)


def make_tokenizer(kind: str = "decoder", **settings: Any) -> PreTrainedTokenizerFast:
    """Whole words: an encoder's, with [CLS] and [SEP], or a decoder's, without a pad token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "encoder":
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **names, **settings)


def make_llava(template: str | None = None) -> LlavaProcessor:
    """For images of 2 × 2 patches."""
    tokenizer = make_tokenizer(extra_special_tokens=["<image>"])
    return LlavaProcessor(
        clip_pictures(), tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def clip_pictures() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8"
    )
    return path


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path)
    return path
