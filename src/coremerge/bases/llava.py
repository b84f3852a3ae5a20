"""A small LLaVA of two other bases, DINOv2 and SmolLM2, and a projector that was trained between them.

Source: Liu et al., "Visual Instruction Tuning", arXiv:2304.08485. Both models stay as they are, and so does the
vocabulary: ``<image>`` is the name that a special token gets which SmolLM2 has and does not use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from coremerge.bases.converter import Converter
from coremerge.bases.folder import write_model

UNUSED = "<empty_output>"
IMAGE = "<image>"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours that DINOv2 was trained with."""

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""SmolLM2's without its system message, and with images."""


def build(vision: Path, language: Path, projector: Path, out: Path) -> None:
    """A ``LlavaForConditionalGeneration`` in float16, with its processor.

    Args:
        vision: folder of a ``Dinov2Model``.
        language: folder of a ``LlamaForCausalLM`` and its tokenizer, which has the token :data:`UNUSED`.
        projector: safetensors file of LLaVA's two layers (``linear_1`` and ``linear_2``, ``weight`` and ``bias``). Its
            metadata says which of the tower's hidden states they read (``layer``) and how large images are (``side``,
            pixels).
        out: to write into.

    Raises:
        ValueError: one of them is no such file.
    """
    from transformers import LlavaForConditionalGeneration

    with safe_open(projector, "pt") as file:
        told = {key: int(value) for key, value in (file.metadata() or {}).items() if key in ("layer", "side")}
    if len(told) < 2:
        raise ValueError("the projector's metadata lacks layer or side")
    tokens = (told["side"] // 14) ** 2
    config = _config(vision, language, told["layer"], tokens)
    write_model(LlavaForConditionalGeneration, config, _weights(vision, language, projector), out, torch.float16)
    _write_processor(language, config, told["side"], out)


def write(sources: Sequence[Path], folder: Path) -> None:
    """:func:`build` of the folders of both bases and the projector, in this order."""
    vision, language, projector = sources
    build(vision, language, projector, folder)


def _config(vision: Path, language: Path, layer: int, tokens: int) -> Any:
    from transformers import AutoConfig, LlavaConfig

    text = AutoConfig.from_pretrained(language, trust_remote_code=False)
    return LlavaConfig(
        vision_config=AutoConfig.from_pretrained(vision, trust_remote_code=False),
        text_config=text,
        image_token_index=_image_token(language),
        image_seq_length=tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",  # without the class token
        tie_word_embeddings=True,
        **{key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _image_token(language: Path) -> int:
    added = json.loads((language / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    found = [int(token["id"]) for token in added if token["content"] == UNUSED]
    if not found:
        raise ValueError(f"the tokenizer has no token {UNUSED}")
    return found[0]


def _weights(vision: Path, language: Path, projector: Path) -> dict[str, Tensor]:
    """All by LLaVA's names; the output embedding is tied."""
    found = {f"model.vision_tower.{key}": value for key, value in load_file(vision / "model.safetensors").items()}
    for key, value in load_file(language / "model.safetensors").items():
        if key != "lm_head.weight":
            found[f"model.language_model.{key.removeprefix('model.')}"] = value
    return found | {f"model.multi_modal_projector.{key}": value for key, value in load_file(projector).items()}


def _write_processor(language: Path, config: Any, side: int, folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    shutil.copy(language / "tokenizer_config.json", folder)
    text = (language / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace(f'"{UNUSED}"', f'"{IMAGE}"'), encoding="utf-8")
    images = CLIPImageProcessor(
        do_center_crop=False, size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD)
    )
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        images,
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, left out again
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


LLAVA = Converter(
    name="llava",
    version=1,
    write=write,
    size=330_000_000,
    hub_id="llava-dinov2-small-smollm2-135m",
    parts=("dinov2", "smollm2"),
    projector=True,
)
