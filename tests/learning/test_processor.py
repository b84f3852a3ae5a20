"""Processors from where base models have them."""

from __future__ import annotations

import sys

import pytest

from coremerge.errors import MissingExtraError, SourceError
from coremerge.learning.processor import load_processor
from families import make_model
from made import clip_pictures, make_llava, make_tokenizer


@pytest.mark.parametrize(
    ("make", "name"),
    [(make_tokenizer, "Token"), (clip_pictures, "CLIPImageProcessor"), (make_llava, "LlavaProcessor")],
)
def test_of_a_folder(tmp_path, make, name):
    make().save_pretrained(tmp_path)
    assert type(load_processor(tmp_path)).__name__.startswith(name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_model_without_one(tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"neither a tokenizer nor an image processor can be loaded: .*Save them"):
        load_processor(tmp_path)


def test_nothing_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="no such base model"):
        load_processor("no such/folder")


def test_of_the_hub(monkeypatch):
    import transformers

    asked = []

    def load(name, **settings):
        asked.append((name, settings))
        if len(asked) == 1:
            raise ImportError("\nneeds torchvision")
        return make_tokenizer()

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    assert load_processor("org/name@v1:sub").eos_token == "</s>"
    assert asked == [("org/name", {"revision": "v1", "subfolder": "sub", "trust_remote_code": False})] * 2


def test_one_for_something_else(monkeypatch, tmp_path):
    import transformers

    for kind in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, **__: object())
    with pytest.raises(SourceError, match="object takes neither texts nor images"):
        load_processor(tmp_path)


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers\. pip install .*\[learn\]"):
        load_processor(tmp_path)
