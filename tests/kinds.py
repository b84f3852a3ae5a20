"""Tiny models of kinds that take other inputs than texts, or keep their parts otherwise than most, and adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

from coremerge import Adapter, LowRank

ATTENTION = ("q_proj", "v_proj", "query", "value")


class Kind(NamedTuple):
    """How one is made and fed, and what of it is adapted."""

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    targets: Sequence[str] = ATTENTION


VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHARED: dict[str, Any] = TEXT | {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 40,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 16,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAVES: dict[str, Any] = {
    "hidden_size": 16, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 40, "feat_extract_norm": "layer",
}  # fmt: skip
LAYERS: dict[str, Any] = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 39, (4, 6), generator=generator)}


def pictures(side: int = 8) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: {"pixel_values": torch.randn(4, 3, side, side, generator=generator)}


def features(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: {"input_features": torch.randn(4, *shape, generator=generator)}


def waves(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: {"input_values": torch.randn(4, *shape, generator=generator)}


def patches(generator: torch.Generator) -> dict[str, Tensor]:
    return {"flattened_patches": torch.cat([torch.ones(4, 4, 2), torch.randn(4, 4, 16, generator=generator)], -1)}


def _gemma4() -> nn.Module:
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARED, global_head_dim=8))


def _gemma3n() -> nn.Module:
    more = {"intermediate_size": [24] * 4, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**{**SHARED, **more}))


def _speecht5() -> nn.Module:
    sizes = {key: value for key, value in PAIR.items() if key.startswith(("encoder", "decoder"))}
    return hf.SpeechT5ForSpeechToText(hf.SpeechT5Config(**WAVES, **sizes))


def _moonshine() -> nn.Module:
    sizes = {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("num_hidden_layers",)}
    heads = {
        f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("num_attention_heads", "num_key_value_heads")
    }
    return hf.MoonshineForConditionalGeneration(
        hf.MoonshineConfig(vocab_size=40, hidden_size=16, intermediate_size=24, **sizes, **heads)
    )


def _reader() -> nn.Module:
    decoder = hf.TrOCRConfig(vocab_size=40, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24)
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    return hf.VisionEncoderDecoderModel(config=both)


def _pix2struct() -> nn.Module:
    sizes = {"hidden_size": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    vision = {"patch_embed_hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 16}
    return hf.Pix2StructForConditionalGeneration(
        hf.Pix2StructConfig(text_config={"vocab_size": 40, **sizes}, vision_config={**sizes, **vision})
    )


def _clip() -> nn.Module:
    words = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    words |= {"num_hidden_layers": 2, "max_position_embeddings": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=16))


SHARING = {"gemma4": Kind(_gemma4, text, ("q_proj", "o_proj")), "gemma3n": Kind(_gemma3n, text, ("q_proj", "o_proj"))}
"""Later layers take keys and values of earlier ones."""

ENCODER_CALLED_BASE = {
    "dinov3_vit": Kind(lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION)), pictures()),
    "dinov3_convnext": Kind(
        lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)),
        pictures(32), ("pointwise_conv1", "pointwise_conv2"),
    ),
    "sapiens2": Kind(lambda: hf.Sapiens2Model(hf.Sapiens2Config(**VISION, num_key_value_heads=2)), pictures()),
}  # fmt: skip
"""``base_model`` is a part that does not take the model's inputs."""

STARTED = {
    "whisper": Kind(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**PAIR, num_mel_bins=8)), features(8, 32)
    ),
    "speech2text": Kind(
        lambda: hf.Speech2TextForConditionalGeneration(
            hf.Speech2TextConfig(
                **PAIR, input_feat_per_channel=8, num_conv_layers=1, conv_kernel_sizes=[3], conv_channels=16
            )
        ),
        features(12, 8),
    ),
    "moonshine": Kind(_moonshine, waves(3000)),
    "speecht5": Kind(_speecht5, waves(400)),
    "reader": Kind(_reader, pictures()),
    "pix2struct": Kind(_pix2struct, patches),
}
"""Encoder–decoders whose encoder reads no tokens."""

HEARING = {
    "whisper_classes": Kind(
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**PAIR, num_mel_bins=8)), features(8, 32)
    ),
    "wav2vec2": Kind(lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVES, **LAYERS)), waves(400)),
    "hubert": Kind(lambda: hf.HubertForSequenceClassification(hf.HubertConfig(**WAVES, **LAYERS)), waves(400)),
    "ast": Kind(
        lambda: hf.ASTForAudioClassification(hf.ASTConfig(hidden_size=16, **LAYERS, max_length=32, num_mel_bins=16)),
        waves(32, 16),
    ),
}
"""Encoders of sounds."""

KINDS = SHARING | ENCODER_CALLED_BASE | STARTED | HEARING
CLIP = Kind(_clip, text)
"""Two towers."""


def make(kind: Kind) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return kind.make().eval()


def batch_of(kind: Kind, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs."""
    return kind.batch(torch.Generator().manual_seed(seed))


def adapters_of(model: nn.Module, targets: Sequence[str] = ATTENTION, rank: int = 2) -> dict[str, Adapter]:
    """Two of random factors."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }
    generator = torch.Generator().manual_seed(1)

    def update(layer: nn.Linear) -> LowRank:
        left, right = (0.3 * torch.randn(n, rank, generator=generator) for n in (layer.out_features, layer.in_features))
        return LowRank(left, right.T)

    return {key: Adapter.from_updates({n: update(x) for n, x in layers.items()}, name=key) for key in "ab"}
