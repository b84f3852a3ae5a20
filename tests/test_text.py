"""What is shown and kept: nothing that a terminal obeys, and no secret."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremerge.text import HIDDEN, redacted, redacted_words, visible, visible_json, visible_lines

NASTY = "\x1b[31m\x9b2J\r\x07\u202e\u2066\ud83d\U000e0041"
TOKEN = "hf_" + "aB3" * 11


@given(st.text())
def test_nothing_is_left_to_obey(text: str) -> None:
    shown = visible(text)
    assert shown == "" or shown.isprintable()
    assert visible(shown) == shown
    assert all(line == "" or line.isprintable() for line in visible_lines(text).split("\n"))


def test_what_is_there_stays_visible() -> None:
    assert visible(f"a{NASTY}b") == r"a\x1b[31m\x9b2J \x07\u202e\u2066\ud83d\U000e0041b"
    assert visible("naïve 模型 b/4.2") == "naïve 模型 b/4.2"


@given(st.dictionaries(st.text(), st.text()))
def test_json_means_the_same_and_can_be_printed(data: dict[str, str]) -> None:
    shown = visible_json(json.dumps(data, indent=1, ensure_ascii=False))
    assert json.loads(shown) == data
    assert shown.replace("\n", "").isprintable()


def test_json_of_half_characters() -> None:
    assert json.loads(visible_json(json.dumps(NASTY, ensure_ascii=False))) == NASTY


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"org/name {TOKEN}", "org/name ***"),
        (f"https://user:{TOKEN}@host/x", "https://***@host/x"),
        ("http://me:pass@host and ssh://me@host", "http://***@host and ssh://***@host"),
        ("https://host/x?X-Amz-Signature=abc&y=1", "https://host/x?X-Amz-Signature=***&y=1"),
        ("https:/host/x?sv=1&sig=a%2Bb%3D&y=1", "https:/host/x?sv=1&sig=***&y=1"),
        ("api_key=abc, password=x; TOKEN=abc", "api_key=***, password=***; TOKEN=***"),
        ("run --hf-token abc -o x", "run --hf-token *** -o x"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["org/name@v1:sub", "a@b.org", "hf_adapters/math", "trainable_token_indices", "--max-tokens 5", "10 tokens = 5"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_token_of_any_form_in_the_environment_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-our-own-hub-1\n")
    assert redacted("x of-our-own-hub-1 y") == f"x {HIDDEN} y"
    monkeypatch.setenv("HF_TOKEN", "x")
    assert redacted("x y") == "x y"


def test_the_words_of_a_command() -> None:
    words = ["coremerge", "merge", "A", "--token", "abc", "--api-key=abc", f"https://{TOKEN}@host/x", "-o", "OUT"]
    said = ["coremerge", "merge", "A", "--token", "***", "--api-key=***", "https://***@host/x", "-o", "OUT"]
    assert redacted_words(words) == said
