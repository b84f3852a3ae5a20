import copy
import inspect
import pickle

import pytest

from coremerge import errors
from coremerge.errors import ConfigError, CoremergeError


def test_the_message_names_file_key_value_and_remedy() -> None:
    error = ConfigError("must be positive", file="a/config.json", key="r", value=-1, remedy="Give r >= 1")
    assert str(error) == "a/config.json: r = -1: must be positive. Give r >= 1"
    assert (error.file, error.key, error.value, error.remedy) == ("a/config.json", "r", -1, "Give r >= 1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "wrong"),
        ({"key": "r"}, "r: wrong"),
        ({"value": None}, "null: wrong"),
        ({"key": "r", "value": "é"}, 'r = "é": wrong'),
        ({"file": "f"}, "f: wrong"),
        ({"remedy": "Do"}, "wrong. Do"),
    ],
)
def test_only_what_is_known_is_said(given: dict, message: str) -> None:
    assert str(CoremergeError("wrong", **given)) == message


def test_long_values_are_cut() -> None:
    message = str(CoremergeError("wrong", value="x" * 500))
    assert message.endswith("...: wrong")
    assert len(message) < 140


def test_values_that_json_does_not_know_are_shown() -> None:
    assert "{1, 2}" in str(CoremergeError("wrong", value={1, 2}))


def test_the_docstring_draws_every_error() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert all(issubclass(c, CoremergeError) and c.__name__ in errors.__doc__ for c in classes)


def test_what_is_quoted_from_a_file_is_one_line_that_commands_no_terminal() -> None:
    nasty = "\x1b[31mred\x9b2J\r\n\u202e\ud83d"
    message = str(CoremergeError(f"wrong {nasty}", file=nasty, key=nasty, value={nasty: nasty}, remedy=nasty))
    assert message.isprintable()
    assert r"wrong \x1b[31mred\x9b2J  \u202e\ud83d" in message


def test_secrets_are_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "our-own-secret")
    message = str(CoremergeError("no our-own-secret", file=f"https://x:hf_{'a' * 34}@host", value="hf_" + "b" * 34))
    assert message == 'https://***@host: "***": no ***'


@pytest.mark.parametrize("value", [{(1, 2): 3}, {b"a": 1}, [1, [2]]])
def test_any_value_is_shown(value: object) -> None:
    if isinstance(value, list):
        value.append(value)
    assert str(CoremergeError("wrong", value=value)).endswith(": wrong")


@pytest.mark.parametrize(
    "given", [{}, {"value": None}, {"key": "r", "value": None}, {"key": "r", "value": 0}, {"key": "r"}]
)
def test_a_refusal_arrives_from_another_process_as_it_was(given: dict) -> None:
    for kind in (CoremergeError, ConfigError):
        sent = kind("wrong", file="a", remedy="Do this", **given)
        for arrived in (pickle.loads(pickle.dumps(sent)), pickle.loads(pickle.dumps(copy.copy(sent)))):
            assert type(arrived) is kind
            assert str(arrived) == str(sent)
            assert (arrived.file, arrived.key, arrived.value, arrived.remedy) == ("a", sent.key, sent.value, "Do this")
