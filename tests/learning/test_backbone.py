"""The backbone of a model; that it is left as it was is tested in test_forward.py, with adapters on it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import kinds
from coremerge.errors import InputError
from coremerge.learning.backbone import StoppedError, backbone_output, blocks, inputs_of, seeded, token_mask
from families import FAMILIES, batches, make_model


def test_blocks_are_counted_in_every_stack():
    assert {family: len(blocks(make_model(family))) for family in FAMILIES} == {
        "bert": 4, "vit": 4, "clip": 4, "llama": 4, "gpt2": 4, "t5": 8, "llava": 8,
    }  # fmt: skip


def test_masks():
    batch = {"attention_mask": torch.ones(2, 3), "decoder_attention_mask": torch.ones(2, 5)}
    assert token_mask(batch, torch.zeros(2, 3, 4)) is batch["attention_mask"]
    assert token_mask(batch, torch.zeros(2, 5, 4)) is batch["decoder_attention_mask"]
    assert token_mask(batch, torch.zeros(6, 4)).shape == (6,)
    assert token_mask(batch, torch.zeros(2, 9, 4)) is None
    assert token_mask({**batch, "token_mask": torch.zeros(2, 3)}, torch.zeros(2, 3, 4)).sum() == 0


def test_random_numbers_from_a_seed_leave_the_callers_where_they_were():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    first, drawn = torch.rand(2), []
    for _ in range(2):
        with seeded(7):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected) and torch.equal(*drawn)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn[0])


@pytest.mark.parametrize("name", kinds.ENCODER_CALLED_BASE)
def test_a_model_whose_base_model_is_its_encoder_runs_itself(name):
    kind = kinds.KINDS[name]
    model, batch = kinds.make(kind), kinds.batch_of(kind)
    assert model.base_model is not model
    with torch.no_grad():
        assert torch.equal(backbone_output(model, batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("name", kinds.STARTED)
def test_a_decoder_gets_one_start_token_whatever_its_encoder_reads(name):
    kind = kinds.KINDS[name]
    model, batch = kinds.make(kind), kinds.batch_of(kind)
    start = {"decoder_input_ids": torch.ones(4, 1, dtype=torch.long)}
    model.config.decoder_start_token_id = 1
    with torch.no_grad():
        found, expected = (backbone_output(model, given) for given in (batch, batch | start))
        other = backbone_output(model, batch | {"decoder_input_ids": 1 + start["decoder_input_ids"]})
    one, two, three = (getattr(output, "last_hidden_state", output) for output in (found, expected, other))
    assert one.shape[:2] == (4, 1) and torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize("name", ["whisper_classes", "hubert", "ast"])
def test_a_model_without_a_decoder_gets_none(name):
    kind = kinds.KINDS[name]
    model, batch = kinds.make(kind), kinds.batch_of(kind)
    with torch.no_grad():
        found, expected = backbone_output(model, batch), model(**batch).logits
    assert getattr(found, "logits", expected).equal(expected)


@pytest.mark.parametrize(("tower", "batch"), [("text_model", kinds.text), ("audio_model", kinds.features(1, 64, 16))])
def test_a_model_of_a_tower_for_sounds_runs_the_one_that_is_fed(tower, batch):
    audio = {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2,
        "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16,
        "num_hidden_layers": 2, "enable_fusion": False, "aff_block_r": 1,
    }  # fmt: skip
    words = {key: kinds.TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    torch.manual_seed(0)
    model = transformers.ClapModel(
        transformers.ClapConfig(text_config=words | {"num_hidden_layers": 2}, audio_config=audio, projection_dim=8)
    ).eval()
    inputs = batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = backbone_output(model, inputs), getattr(model, tower)(**inputs)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


class Wrapper(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_part_that_hands_on_all_inputs_takes_them():
    model = make_model("bert")
    batch = batches("bert")[0]
    with torch.no_grad():
        assert torch.equal(backbone_output(Wrapper(Wrapper(model)), batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("name", "change", "layer", "kind"),
    [
        ("gemma4", {"input_ids": torch.full((1, 3), 99)}, "model.embed_tokens", "IndexError"),
        ("whisper", {"input_features": torch.zeros(1, 9, 32)}, "model.encoder.conv1", "RuntimeError"),
        ("wav2vec2", {"attention_mask": "all"}, "wav2vec2", "AttributeError"),
        ("dinov3_vit", {"pixel_values": None}, "DINOv3ViTModel", "AttributeError"),
    ],
)
def test_a_models_own_exception_is_a_refusal_that_names_the_layer(name, change, layer, kind):
    model = kinds.make(kinds.KINDS[name])
    given = kinds.batch_of(kinds.KINDS[name]) | change
    said = f"on the inputs of math the base model stops here with {kind}: "
    with torch.no_grad(), pytest.raises(InputError, match=said) as raised, inputs_of("math"):
        backbone_output(model, given)
    assert raised.value.key.startswith(layer) and type(raised.value.__cause__).__name__ == kind
    assert next(iter(change)) in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("no room"),
        OSError("a disk"),
        InputError("no"),
    ],
)
def test_what_is_not_the_models_fault_stays_what_it_is(error):
    model = make_model("bert")

    def fail(*_):
        raise error

    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(fail)
    with pytest.raises(type(error)) as raised:
        backbone_output(model, batches("bert")[0])
    assert raised.value is error and not isinstance(error, StoppedError)
