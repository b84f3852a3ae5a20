"""Plain attention: when it is taken, that it is the same attention, and that the model is as it was."""

from __future__ import annotations

import pytest
import torch

from coremerge.learning.attention import SHORT, are_short, plain_attention
from families import batches, make_model


def kinds_of(model: torch.nn.Module) -> set[str]:
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "llava"])
def test_in_bfloat16_on_a_processor(family: str) -> None:
    model = make_model(family)
    if kinds_of(model) != {"sdpa"}:
        pytest.skip("it has no fused attention")
    with plain_attention(model):
        assert kinds_of(model) == {"sdpa"}  # float32: no gain
    with plain_attention(model, torch.bfloat16):
        assert kinds_of(model) == {"eager"}
    (batch,) = batches(family, 1)
    before = model(**batch)[0]
    model = model.to(torch.bfloat16)
    with plain_attention(model):
        assert kinds_of(model) == {"eager"}
        found = model.float()(**batch)[0]
    assert kinds_of(model) == {"sdpa"}
    assert (found - before).abs().max() <= 0.05 * before.abs().max()


def test_not_where_a_part_has_attention_of_another_kind() -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    with plain_attention(model):
        assert kinds_of(model) == {"eager"}
    assert kinds_of(model) == {"eager"}
    with plain_attention(torch.nn.Linear(2, 2).to(torch.bfloat16)):  # not of transformers
        pass


def test_inputs_are_short_if_all_are() -> None:
    text, long = {"input_ids": torch.zeros(2, SHORT)}, {"input_ids": torch.zeros(2, SHORT + 1)}
    small, large = ({"pixel_values": torch.zeros(1, 3, side, side)} for side in (224, 238))
    assert are_short([text, small, text | small])
    sound = {"input_features": torch.zeros(2, 8, 3000)}
    for batch in (long, large, text | large, sound, sound | {"decoder_input_ids": torch.zeros(2, 4)}):
        assert not are_short([text, batch])
