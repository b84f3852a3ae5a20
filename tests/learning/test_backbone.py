"""The backbone of a model; that it is left as it was is tested in test_forward.py, with adapters on it."""

from __future__ import annotations

import torch

from coremerge.learning.backbone import blocks, seeded, token_mask
from families import FAMILIES, make_model


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
