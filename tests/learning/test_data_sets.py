"""Inputs from data sets, on disk and on the hub."""

from __future__ import annotations

import io
import logging

import datasets
import pytest
from PIL import Image

from coremerge.errors import ConfigError, SourceError
from coremerge.learning.examples import read_examples
from coremerge.learning.rows import Example, Message
from made import jsonl, picture

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there", "weight": 1}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


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

    @pytest.mark.parametrize("path", ["a.png", "/etc/passwd", "~/a.png"])
    @pytest.mark.parametrize("images", [False, True])
    def test_a_path_means_nothing_there(self, monkeypatch, path, images):
        held = {"bytes": None, "path": path} if images else path
        data = datasets.Dataset.from_dict({"image": [held]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        with pytest.raises(ConfigError, match=rf'org/name:train, row 0: image = "{path}": a path, which a data set of'):
            read_examples("org/name:train")

    def test_but_for_one_that_was_downloaded_with_it(self, monkeypatch, tmp_path):
        file = picture(tmp_path / "cache/a.png")
        data = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)}]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (found,) = read_examples("org/name:train")
        assert found.image == file

    @pytest.mark.parametrize("error", [OSError("\noffline"), datasets.exceptions.DatasetsError("offline")])
    def test_one_that_does_not_load(self, monkeypatch, error):
        def load(*args, **settings):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(SourceError, match=r"org/name: no such file or folder here, and .*: offline"):
            read_examples("org/name")
