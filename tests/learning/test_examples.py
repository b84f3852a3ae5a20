"""Inputs from files: what is read, what is drawn, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremerge.errors import ConfigError, SourceError
from coremerge.learning.examples import read_examples
from coremerge.learning.rows import Example, Message
from made import jsonl, picture

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there", "weight": 1}]


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
