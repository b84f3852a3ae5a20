"""Inputs from files: what is read, what is drawn, and what a refusal says."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from coremerge.errors import ConfigError, InputError, MissingExtraError, SourceError
from coremerge.learning.examples import Example, Message, one_kind, optional, read_examples

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there", "weight": 1}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8"
    )
    return path


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path)
    return path


class TestJsonLines:
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "JSONL"])
    def test_texts(self, tmp_path, suffix):
        path = jsonl(
            tmp_path / f"a.{suffix}", {"text": "one", "label": 3}, "", {"text": "two\u2028lines", "pair": None}
        )
        found = read_examples(path)
        assert found == [Example("one"), Example("two\u2028lines")]
        assert found[1].place == f"{path}, line 3"

    @pytest.mark.parametrize("key", ["pair", "text_pair"])
    def test_pairs(self, tmp_path, key):
        assert read_examples(jsonl(tmp_path / "a.jsonl", {"text": "one", key: "two"})) == [Example("one", "two")]

    def test_chats(self, tmp_path):
        (found,) = read_examples(jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "id": 3}))
        assert found.messages == (Message("user", "hello"), Message("assistant", "there"))
        assert found.kind == "messages"

    def test_images_are_beside_the_file(self, tmp_path):
        picture(tmp_path / "in" / "pictures" / "a.png")
        path = jsonl(tmp_path / "in" / "a.jsonl", {"image": "pictures/a.png", "text": "what"})
        assert read_examples(path) == [Example("what", image=tmp_path / "in" / "pictures" / "a.png")]

    def test_what_is_not_read_may_be_anything(self, tmp_path):
        rows = ({"text": "a", "label": None}, {"text": "b", "labels": {"x": []}}, {"text": "c"})
        assert [e.text for e in read_examples(jsonl(tmp_path / "a.jsonl", *rows))] == ["a", "b", "c"]

    def test_blank_texts_are_passed_over(self, tmp_path):
        rows = (
            {"text": " "},
            {"text": "a"},
            {"text": "", "pair": "b"},
            {"messages": [{"role": "user", "content": ""}]},
        )
        assert read_examples(jsonl(tmp_path / "a.jsonl", *rows)) == [Example("a")]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{text: 1}", r"a\.jsonl, line 2: .*: no JSON: .*One object a line"),
            ("[1]", r"line 2: \[1\]: no JSON object"),
            ("[" * 100_000, "line 2: .*no JSON"),
            ({"sentence": "a", "label": 1}, r"line 2: no key of an input.*its keys: sentence, label"),
            ({}, "its keys: none"),
            ({"text": 3}, "line 2: text = 3: a string is needed"),
            ({"pair": "a"}, "line 2: these keys make no input: pair"),
            ({"text": "a", "messages": CHAT}, "these keys make no input: text, messages"),
            ({"text": "a", "pair": "b", "text_pair": "c"}, "these keys make no input: text, pair, text_pair"),
            ({"messages": "hello"}, "line 2: messages = .*no chat"),
            ({"messages": []}, "no chat"),
            ({"messages": [{"role": "user", "content": None}]}, "role and content strings"),
            ({"image": ["a.png"]}, "line 2: image = .*a string"),
            ({"text": "a", "pair": "b"}, r"line 2: this input is text and pair, but the one at .*line 1 is text\."),
            ({"image": "a.png", "text": "a"}, "line 2: this input is text and image"),
        ],
    )
    def test_lines_that_are_no_input(self, tmp_path, row, message):
        with pytest.raises(ConfigError, match=message):
            read_examples(jsonl(tmp_path / "a.jsonl", {"text": "fine"}, row))

    def test_an_image_that_is_not_there(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", {"image": "b/none.png"})
        with pytest.raises(SourceError, match=r'a\.jsonl, line 1: image = ".*none\.png": no such image'):
            read_examples(path)


class TestFiles:
    def test_a_text_file(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  two \n".encode())
        assert read_examples(str(tmp_path / "a.txt")) == [Example("one"), Example("two")]

    def test_a_folder_of_images(self, tmp_path):
        paths = [picture(tmp_path / name) for name in ("b.JPG", "a/x.png", "c.webp", "a/a.bmp", "d.jpeg")]
        (tmp_path / "labels.csv").write_text("a")
        assert [e.image for e in read_examples(tmp_path)] == sorted(paths)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b"", "holds no input"),
            ("a.txt", b" \n", "holds no input"),
            ("a.txt", b"\xff\xfe\x00", "no UTF-8 text"),
            ("a.csv", b"text\n", "not a file that inputs are read from. Give a .jsonl"),
            ("a/b.jsonl", b"", r"no images in this folder.*Name the file: .*b\.jsonl"),
            ("a/b.csv", b"", r"no images in this folder.*Give a \.jsonl"),
        ],
    )
    def test_what_holds_nothing(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            read_examples(tmp_path / name.split("/", maxsplit=1)[0])

    def test_a_file_that_cannot_be_read(self, tmp_path, monkeypatch):
        path = jsonl(tmp_path / "a.jsonl", {"text": "a"})

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_text", refuse)
        with pytest.raises(SourceError, match="cannot be read: Permission denied"):
            read_examples(path)

    @pytest.mark.parametrize("source", ["nothing", "data/none.jsonl", Path("org/name"), ""])
    def test_what_is_not_there(self, source):
        with pytest.raises(SourceError, match=r"no such file or folder. Give a"):
            read_examples(source)


class TestDraw:
    @pytest.fixture
    def path(self, tmp_path):
        return jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100)))

    def test_it_goes_by_the_seed(self, path):
        one, same, other = (read_examples(path, count=10, seed=seed) for seed in (0, 0, 1))
        assert one == same != other
        assert len({e.text for e in one}) == 10

    def test_all_are_taken_in_order_where_there_are_fewer(self, path):
        assert [e.text for e in read_examples(path, count=1000, seed=5)] == [str(i) for i in range(100)]

    def test_only_drawn_images_must_be_there(self, tmp_path):
        rows = [{"image": f"{i}.png"} for i in range(50)]
        path = jsonl(tmp_path / "a.jsonl", *rows)
        for i in range(50):
            picture(tmp_path / f"{i}.png")
        (drawn,) = read_examples(path, count=1)
        for i in range(50):
            (tmp_path / f"{i}.png").unlink()
        picture(drawn.image)
        assert read_examples(path, count=1) == [drawn]

    def test_of_nothing(self, path):
        with pytest.raises(ConfigError, match="count = 0"):
            read_examples(path, count=0)


class TestDataSets:
    def test_a_saved_one(self, tmp_path):
        data = {"text": ["one", "", "two"], "label": [1, 2, 3]}
        datasets.Dataset.from_dict(data).save_to_disk(tmp_path / "set")
        found = read_examples(tmp_path / "set")
        assert found == [Example("one"), Example("two")]
        assert found[1].place == f"{tmp_path / 'set'}, row 2"

    def test_blank_rows_do_not_count_for_the_draw(self, tmp_path):
        datasets.Dataset.from_dict({"text": ["", "x"] * 50}).save_to_disk(tmp_path / "set")
        assert len(read_examples(tmp_path / "set", count=40)) == 40

    def test_its_rows_are_of_one_kind(self, tmp_path):
        datasets.Dataset.from_dict({"text": ["a", "b"], "pair": ["c", None]}).save_to_disk(tmp_path / "set")
        with pytest.raises(ConfigError, match=r"row 1: this input is text, but the one at .*row 0 is text and pair\."):
            read_examples(tmp_path / "set")

    def test_images_in_it_are_not_decoded(self, tmp_path):
        shades = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 20)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict({"image": shades, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "set")
        found = read_examples(tmp_path / "set")
        assert [Image.open(io.BytesIO(e.image)).getpixel((0, 0))[0] for e in found] == [10, 20]

    def test_paths_of_images_in_it(self, tmp_path):
        datasets.Dataset.from_dict({"image": ["a.png"]}).save_to_disk(tmp_path / "set")
        path = picture(tmp_path / "set" / "a.png")
        assert read_examples(tmp_path / "set") == [Example(image=path)]

    def test_chats_in_it(self, tmp_path):
        datasets.Dataset.from_dict({"messages": [CHAT]}).save_to_disk(tmp_path / "set")
        assert read_examples(tmp_path / "set")[0].messages[1] == Message("assistant", "there")

    @pytest.mark.parametrize(
        ("splits", "taken"),
        [
            (["train", "test", "validation"], "validation"),
            (["train", "test"], "test"),
            (["other", "train"], "train"),
            (["sole"], "sole"),
        ],
    )
    def test_a_split_is_taken_and_named(self, tmp_path, caplog, splits, taken):
        sets = {name: datasets.Dataset.from_dict({"text": [name]}) for name in splits}
        datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
        with caplog.at_level(logging.WARNING):
            assert read_examples(tmp_path / "set") == [Example(taken)]
        assert f"has the splits {', '.join(splits)}; taken: {tmp_path / 'set'}/{taken}" in caplog.text
        caplog.clear()
        assert read_examples(tmp_path / "set" / splits[0]) == [Example(splits[0])]
        assert not caplog.text

    def test_no_split_can_be_taken(self, tmp_path):
        sets = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("a", "b")}
        datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
        with pytest.raises(ConfigError, match=r'splits = \["a", "b"\]: none of.*Name one, such as .*set/a'):
            read_examples(tmp_path / "set")

    def test_no_column_is_an_input(self, tmp_path):
        datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]}).save_to_disk(tmp_path / "set")
        with pytest.raises(ConfigError, match=r'columns = \["sentence", "label"\]: no column of an input. Rename'):
            read_examples(tmp_path / "set")

    def test_a_broken_one(self, tmp_path):
        (tmp_path / "state.json").write_text("{}")
        with pytest.raises(SourceError, match="this saved data set cannot be read"):
            read_examples(tmp_path)


class TestHub:
    @pytest.mark.parametrize(
        ("source", "repo", "revision", "split"),
        [
            ("org/name", "org/name", None, None),
            ("org/name:train", "org/name", None, "train"),
            ("org/name@v1:train", "org/name", "v1", "train"),
        ],
    )
    def test_what_is_asked_for(self, monkeypatch, source, repo, revision, split):
        asked = []

        def load(name, **settings):
            asked.append((name, settings))
            return datasets.Dataset.from_dict({"text": ["a"], "label": [1]})

        monkeypatch.setattr(datasets, "load_dataset", load)
        (found,) = read_examples(source)
        assert found == Example("a") and found.place == f"{source}, row 0"
        assert asked == [(repo, {"revision": revision, "split": split, "trust_remote_code": False})]

    def test_its_splits(self, monkeypatch, caplog):
        sets = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(sets))
        assert read_examples("org/name") == [Example("test")]
        assert "taken: org/name:test" in caplog.text

    def test_the_true_loader_takes_these_settings(self, tmp_path, monkeypatch):
        """From a folder, as there is no hub here."""
        jsonl(tmp_path / "set" / "train.jsonl", {"text": "a"}, {"text": "b"})
        load = datasets.load_dataset
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, **given: load(str(tmp_path / "set"), cache_dir=tmp_path, **given)
        )
        assert [e.text for e in read_examples("org/name:train")] == ["a", "b"]
        with pytest.raises(SourceError, match="the hub gives no such data set: Unknown split"):
            read_examples("org/name:dev")

    def test_a_path_means_nothing_there(self, monkeypatch):
        data = datasets.Dataset.from_dict({"image": ["a.png"]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        with pytest.raises(ConfigError, match=r'org/name:train, row 0: image = "a.png": a path, which a data set of'):
            read_examples("org/name:train")

    @pytest.mark.parametrize("error", [OSError("\noffline"), datasets.exceptions.DatasetsError("offline")])
    def test_one_that_does_not_load(self, monkeypatch, error):
        def load(*args, **settings):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(SourceError, match=r"org/name: no such file or folder here, and .*: offline"):
            read_examples("org/name")


def test_one_kind():
    assert one_kind([Example("a"), Example("b")]) == "text"
    with pytest.raises(InputError, match="no inputs"):
        one_kind([])


@pytest.mark.parametrize(("module", "name"), [("datasets", "datasets"), ("PIL.Image", "pillow")])
def test_a_missing_extra_is_named(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"need {name}. pip install 'coremerge\[learn\]'"):
        optional(module)
