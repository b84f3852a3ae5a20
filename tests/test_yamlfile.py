"""YAML from people: what is hostile or absurd is refused, at once, by a message that names the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coremerge import yamlfile
from coremerge.cli import _options
from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation import read_taskset
from coremerge.evaluation.plan import read_plan
from coremerge.recipe import read_recipe
from coremerge.yamlfile import parse_yaml, read_mapping, read_yaml, text_of


def nested(inner: str, form: str) -> str:
    """A few lines that are billions once written out."""
    lines = [f"a0: &a0 {inner}"]
    lines += [f"a{i}: &a{i} {form % ', '.join([f'*a{i - 1}'] * 9)}" for i in range(1, 12)]
    return "\n".join(lines)


HOSTILE = {
    "an object": ("a: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
    "a module": ("a: !!python/module:antigravity", "could not determine a constructor"),
    "a tag of its own": ("a: !function utils.run", "could not determine a constructor"),
    "billion laughs": (nested("[x, x]", "[%s]"), "aliases written out"),
    "billion merged keys": (nested("{k: 1}", "{<<: [%s]}"), "aliases written out"),
    "a list in itself": ("a: &a [*a]", "aliases written out"),
    "a number of base 60": ("a: " + "1:" * 20_000 + "1", "a number of 40001 characters"),
    "too many digits": ("a: " + "1" * 5000, "a number of 5000 characters"),
    "no such day": ("a: !!timestamp 2001-99-99", "month must be in"),
    "no such truth": ("a: !!bool x", "not YAML: 'x'"),
    "no such time": ("a: !!timestamp x", "not YAML"),
    "an empty number": ("a: !!int ''", "not YAML"),
    "a null byte": ("a: \0", "unacceptable character"),
    "nested": ("[" * 500, "nested more than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[name]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    start = time.perf_counter()
    for read in (read_yaml, read_recipe, read_taskset, read_plan, _options._weights_in):
        with pytest.raises(ConfigError, match=rf"x\.yaml: .*{message}"):
            read(file)
    assert time.perf_counter() - start < 20
    assert list(tmp_path.iterdir()) == [file]


def test_aliases_in_their_measure_are_fine() -> None:
    assert parse_yaml("a: &a {k: [1, 2]}\nb: {<<: *a, l: *a}") == {
        "a": {"k": [1, 2]},
        "b": {"k": [1, 2], "l": {"k": [1, 2]}},
    }


WORDS = [
    "no",
    "On",
    "yes",
    "y",
    "true",
    "false",
    "True",
    "16",
    "-1",
    "0x10",
    "010",
    "1_000",
    "0.5",
    "1.50",
    "1e3",
    "1e-05",
]
WORDS += ["12:30", "2001-01-01", ".inf", ".nan", "=", "+1", "a b", "0.1", "1.0e-05"]


@pytest.mark.parametrize("word", WORDS)
def test_names_keep_their_text(word: str) -> None:
    assert list(parse_yaml(f"{{{word}: 1}}" if word != "=" else "=: 1")) == [word]
    assert text_of(parse_yaml(f"a: {word}")["a"]) == word


def test_truths_and_numbers_as_they_are_mostly_written_are_values() -> None:
    assert parse_yaml("[true, false, null, ~, 16, -1, 0.5, 1e-05, !!int 0x10]") == [
        True, False, None, None, 16, -1, 0.5, "1e-05", 16,
    ]  # fmt: skip
    assert parse_yaml("{null: 1, ~: 2}") == {"null": 1, "~": 2}


def test_a_key_that_is_an_object_is_refused() -> None:
    with pytest.raises(ValueError, match="could not determine a constructor"):
        parse_yaml("!!python/name:os.system x: 1")


JSON = {
    "tabs": ('{\n\t"a": [1,\n\t0.5]}', {"a": [1, 0.5]}),
    "a large exponent": ('{"a": 1e3, "no": 1}', {"a": 1000.0, "no": 1}),
    "a mark at the start": ('\ufeff{"a": 1}', {"a": 1}),
    "a comma too many, as YAML has it": ('{"a": 1,}', {"a": 1}),
}


@pytest.mark.parametrize("name", JSON)
def test_a_file_called_json_is_json(tmp_path: Path, name: str) -> None:
    text, expected = JSON[name]
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "x.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": 1', "Expecting ',' delimiter"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_bad_json_is_called_that(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.json: not JSON: .*{message}"):
        read_yaml(tmp_path / "x.json")


def test_an_option_that_is_hostile_is_text() -> None:
    for text in ("!!python/name:os.system", "2001-99-99", "!!bool x", "&a [*a]"):
        assert _options.parameters([f"x={text}"]) == {"x": text}


def test_a_file_too_large_to_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlfile, "LARGEST_FILE", 3)
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"x\.yaml: larger than"):
        read_yaml(tmp_path / "x.yaml")


def mapping(folder, text):
    (folder / "f.yaml").write_text(text)
    return read_mapping(folder / "f.yaml", "a thing")


def test_yaml_and_json_are_read(tmp_path):
    assert mapping(tmp_path, "a: [1, x]\n2: {b: null}") == {"a": [1, "x"], "2": {"b": None}}
    assert mapping(tmp_path, '{"a": [1, "x"]}') == {"a": [1, "x"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"\[1\]: a thing is a mapping"),
        ("a: [", "not YAML"),
        ("a: 1\nb: {c: 1, c: 2}", "'c' is there twice .*line 2, column 11"),
        ("a: !!timestamp 1999-13-41", "not YAML: month must be"),
        ("1: a\n'1': b", "'1' is there twice"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!python/object:os.system {}", "not YAML"),
        ("[" * 3000, "not YAML"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"f\.yaml: .*{message}"):
        mapping(tmp_path, text)


def test_a_key_that_is_merged_in_may_be_said_again(tmp_path):
    found = mapping(tmp_path, "a: {x: {y: &one {k: 1}, z: &two {<<: *one, k: 2}}}\nb: {<<: *two, k: 3}\nc: *two")
    assert found["a"]["x"]["z"] == found["c"] == {"k": 2}
    assert found["b"] == {"k": 3}


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(SourceError, match=r"none\.yaml: cannot be read: No such file or directory"):
        read_mapping(tmp_path / "none.yaml", "a thing")
    (tmp_path / "f.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not YAML"):
        read_mapping(tmp_path / "f.yaml", "a thing")
