"""Whisper from CTranslate2's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, WhisperForConditionalGeneration

from coremerge.bases import make
from coremerge.learning.files import load_report
from fake_packages import make_whisper


def test_it_is_the_model_that_was_converted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_whisper(site, monkeypatch)
    with load_report():
        made = WhisperForConditionalGeneration.from_pretrained(make("whisper"), dtype=torch.float32).eval()
    sound, words = torch.randn(2, 80, 40), torch.randint(0, 200, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            made(sound, decoder_input_ids=words).logits, model(sound, decoder_input_ids=words).logits, rtol=0, atol=0
        )


def test_what_is_not_said_and_where_it_begins_come_with_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_whisper(site, monkeypatch)
    with load_report():
        made = WhisperForConditionalGeneration.from_pretrained(make("whisper"))
    said = made.generation_config
    assert (said.suppress_tokens, said.begin_suppress_tokens, said.alignment_heads) == ([5], [0], [[0, 0]])
    assert (said.decoder_start_token_id, said.no_timestamps_token_id, said.max_length) == (1, 3, 16)


def test_the_processor_takes_sound_and_text(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_whisper(site, monkeypatch)
    processor = AutoProcessor.from_pretrained(make("whisper"))
    assert processor.feature_extractor.feature_size == 80
    assert processor.tokenizer.decode(processor.tokenizer("a bc").input_ids, skip_special_tokens=True) == "a bc"
    sound = processor(torch.zeros(16_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    assert sound.input_features.shape == (1, 80, 3000)
