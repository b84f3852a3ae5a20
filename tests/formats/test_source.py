"""Where adapters are: folders, files, and the hub, through its cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import zoo
from benchmarks.reliability import hub
from huggingface_hub import errors
from safetensors.torch import load_file, save, save_file

from coremerge import load
from coremerge.errors import SourceError
from coremerge.formats.source import HubId, parse_hub_id

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_a_file_and_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo.simple(tmp_path / "my-adapter")
    for source in (folder, str(folder), folder / WEIGHTS, str(folder / CONFIG), f"{folder}/"):
        adapter = load(source)
        assert adapter.name == "my-adapter"
        assert adapter.info.source == str(source)
        assert adapter.info.files == (folder / CONFIG, folder / WEIGHTS)
        assert adapter.info.revision is None
    monkeypatch.chdir(folder)
    for source in (".", WEIGHTS, Path()):
        assert load(source).name == "my-adapter"
    assert load(".", name="label").name == "label"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/my-adapter").name == "my-adapter"


def test_a_file_of_another_name(tmp_path: Path) -> None:
    folder = zoo.simple(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "step-100.safetensors")
    assert load(folder / "step-100.safetensors").name == "step-100"


NOWHERE = ["", "nope", "./nope/deeper", "/nope", "a/b/c", "~nobody-here/x", "org/na me", "x" * 5000, "a\0b", "org/../x"]


@pytest.mark.parametrize("source", NOWHERE, ids=lambda source: source[:20])
def test_nothing_there(source: str) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder. Give an adapter's folder.*hub id"):
        load(source)
    with pytest.raises(SourceError, match="no such file or folder"):
        load(Path("org/name"))


class TestFolders:
    """Folders that are no adapter say why."""

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"the folder is empty. Download"):
            load(tmp_path)

    def test_whole_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(SourceError, match=r"adapter_config.json: no adapter_config.json.*whole model.*save_pretr"):
            load(tmp_path)

    @pytest.mark.parametrize("depth", ["", "run/"])
    def test_several_adapters_below(self, tmp_path: Path, depth: str) -> None:
        for number in range(10):
            zoo.simple(tmp_path / f"{depth}checkpoint-{number}")
        with pytest.raises(SourceError, match=rf"adapters in subfolders: {depth}checkpoint-0, .*7, \.\.\.\. Name one"):
            load(tmp_path)
        assert load(tmp_path / f"{depth}checkpoint-3").name == "checkpoint-3"

    def test_no_weights(self, tmp_path: Path) -> None:
        folder = zoo.simple(tmp_path / "a")
        (folder / WEIGHTS).unlink()
        with pytest.raises(
            SourceError, match=r"a: adapter_model.safetensors: no adapter_model.safetensors.*allow_pick"
        ):
            load(folder)

    def test_weights_without_a_config(self, tmp_path: Path) -> None:
        folder = zoo.simple(tmp_path / "a")
        (folder / CONFIG).unlink()
        with pytest.raises(SourceError, match=r"safetensors: adapter_config.json: no adapter_config.json beside"):
            load(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name:math", HubId("org/name", None, "math")),
        ("org/name:a/b/", HubId("org/name", None, "a/b")),
        ("org/name@abc:math", HubId("org/name", "abc", "math")),
        ("org/name:math@abc", HubId("org/name", "abc", "math")),
        ("org/name@a:b@c", None),
        ("name", None),
        ("a/b/c", None),
        ("org/name:../x", None),
        ("/org/name", None),
        ("org/name:", None),
        ("C:\\adapters", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_a_revision_given_apart() -> None:
    assert parse_hub_id("org/name", "v2") == HubId("org/name", "v2")
    assert parse_hub_id("org/name@v1", "v2") == HubId("org/name", "v1")


@pytest.mark.usefixtures("offline")
class TestHub:
    """Through the hub's cache, with the hub switched off."""

    def cache(self, tmp_path: Path) -> Path:
        folder = zoo.simple(tmp_path / "made")
        files = {name: folder / name for name in (CONFIG, WEIGHTS)}
        zoo.hub_cache(tmp_path / "hub", "org/name", files)
        zoo.hub_cache(tmp_path / "hub", "org/name", files, ref="v1", commit="b" * 40)
        many = {f"{sub}/{name}": file for sub in ("x", "y") for name, file in files.items()}
        return zoo.hub_cache(tmp_path / "hub", "org/many", many)

    def test_main_and_its_commit(self, tmp_path: Path) -> None:
        adapter = load("org/name", cache_dir=self.cache(tmp_path))
        assert (adapter.name, adapter.info.source, adapter.info.revision) == ("name", "org/name", "a" * 40)
        assert adapter["layers.0.q_proj"].rank == 2
        assert all(str(file).startswith(str(tmp_path / "hub")) for file in adapter.info.files)

    def test_the_environments_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.cache(tmp_path)))
        assert load("org/name").info.revision == "a" * 40

    @pytest.mark.parametrize(
        ("source", "revision"), [("org/name@v1", None), ("org/name", "v1"), (f"org/name@{'b' * 40}", None)]
    )
    def test_a_revision(self, tmp_path: Path, source: str, revision: str | None) -> None:
        assert load(source, revision=revision, cache_dir=self.cache(tmp_path)).info.revision == "b" * 40

    def test_a_subfolder(self, tmp_path: Path) -> None:
        adapter = load("org/many:y", cache_dir=self.cache(tmp_path))
        assert adapter.name == "y"
        assert adapter.info.files[0].parent.name == "y"
        assert load(f"org/many@{'a' * 40}:x", cache_dir=tmp_path / "hub").name == "x"
        with pytest.raises(SourceError, match=r"org/many:z: z: the repository has no such folder"):
            load("org/many:z", cache_dir=tmp_path / "hub")

    def test_several_adapters(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"org/many: .*in subfolders: x, y. Name one of them: org/many:<folder>"):
            load("org/many", cache_dir=self.cache(tmp_path))

    def test_only_a_pickle(self, tmp_path: Path) -> None:
        import torch

        folder = zoo.simple(tmp_path / "made")
        torch.save(zoo.lora("layers.0.q_proj"), tmp_path / "adapter_model.bin")
        files = {CONFIG: folder / CONFIG, "adapter_model.bin": tmp_path / "adapter_model.bin"}
        cache = zoo.hub_cache(tmp_path / "hub", "org/old", files)
        with pytest.raises(SourceError, match=r"org/old: this is a pickle.*allow_pickle"):
            load("org/old", cache_dir=cache)
        assert len(load("org/old", cache_dir=cache, allow_pickle=True)) == 1

    @pytest.mark.parametrize("source", ["org/none", "org/name@v9"])
    def test_not_cached(self, tmp_path: Path, source: str) -> None:
        with pytest.raises(SourceError, match=rf"{source}: .*not cached it.*unset HF_HUB_OFFLINE"):
            load(source, cache_dir=self.cache(tmp_path))

    def test_a_local_folder_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = self.cache(tmp_path)
        zoo.simple(tmp_path / "org/name")
        monkeypatch.chdir(tmp_path)
        assert load("org/name", cache_dir=cache).info.revision is None

    def test_what_is_beside_it(self, tmp_path: Path) -> None:
        cache = self.cache(tmp_path)
        for name in ("tokenizer.json", "value_head.safetensors", "README.md"):
            (tmp_path / name).write_text("{}")
            zoo.hub_cache(cache, "org/name", {name: tmp_path / name})
        beside = load("org/name", cache_dir=cache).info.beside
        assert set(beside) == {"tokenizer.json", "value_head.safetensors"}

    def test_shards(self, tmp_path: Path) -> None:
        folder = zoo.simple(tmp_path / "made")
        names = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        tensors = list(load_file(folder / WEIGHTS).items())
        save_file(dict(tensors[:2]), tmp_path / names[0])
        save_file(dict(tensors[2:]), tmp_path / names[1])
        files = {CONFIG: folder / CONFIG, **{name: tmp_path / name for name in names}}
        cache = zoo.hub_cache(tmp_path / "hub", "org/split", files)
        adapter = load("org/split", cache_dir=cache)
        assert (adapter.name, len(adapter), adapter.info.revision) == ("split", 2, "a" * 40)

    def test_an_initial_adapter_from_the_hub(self, tmp_path: Path) -> None:
        trained = zoo.simple(tmp_path / "trained", init_lora_weights="pissa")
        adapter = load(trained, initial="org/name", cache_dir=self.cache(tmp_path))
        assert not adapter["layers.0.q_proj"].dense().any()


def answer(kind: type[Exception]) -> Exception:
    """An error of the hub's, made without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("refused\nmore",)
    return error


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: answer(errors.GatedRepoError), "this repository is gated. Ask for access.*HF_TOKEN"),
        (
            lambda: answer(errors.RepositoryNotFoundError),
            "no such file .*no such repository on the hub.*private.*HF_TOKEN",
        ),
        (lambda: answer(errors.RevisionNotFoundError), r'revision = "v1": the repository has no such revision'),
        (lambda: answer(errors.HfHubHTTPError), "the hub did not answer as expected: refused. Try again"),
        (lambda: OSError("disk full"), "the hub did not answer as expected: disk full"),
        (lambda: OSError(28, "No space left"), "cannot be kept in the hub's cache: .*No space left. Free some space"),
        (lambda: ValueError("not JSON"), "something other than the hub answers: not JSON. Check HF_ENDPOINT"),
        (RuntimeError, "the hub did not answer as expected: RuntimeError. Try again"),
        (lambda: errors.HFValidationError("bad"), "not a hub id: bad"),
        (errors.OfflineModeIsEnabled, ".*switched off"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, made: Callable[[], Exception], message: str) -> None:
    asked: dict[str, Any] = {}

    def refuse(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise made()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(SourceError, match=rf"org/name@v1:sub: {message}"):
        load("org/name@v1:sub", token="secret", cache_dir="there")
    assert asked["repo"] == "org/name"
    assert (asked["revision"], asked["token"], asked["cache_dir"]) == ("v1", "secret", "there")
    patterns = asked["allow_patterns"]
    assert patterns[:2] == [f"sub/{CONFIG}", f"sub/{WEIGHTS}"] and patterns[-1] == f"sub/*/{CONFIG}"
    assert {"sub/tokenizer.json", "sub/value_head.safetensors"} < set(
        patterns
    ) and "sub/adapter_model.bin" not in patterns


class TestServer:
    """The hub's real client and a hub on this machine."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
        folder = zoo.simple(tmp_path / "made")
        with hub.Hub(folder) as served:
            place = served.environment["HF_ENDPOINT"]
            url = place + "/{repo_id}/resolve/{revision}/{filename}"
            given = {"ENDPOINT": place, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_OFFLINE": False}
            patience = {"HF_HUB_ETAG_TIMEOUT": 0.3, "HF_HUB_DOWNLOAD_TIMEOUT": 0.3, "HF_HUB_DISABLE_XET": True}
            for name, value in {**given, **patience}.items():
                monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
            monkeypatch.setenv("NO_PROXY", "*")
            huggingface_hub.close_session()
            yield served
            huggingface_hub.close_session()

    def test_files_that_are_whole(self, served: hub.Hub, tmp_path: Path) -> None:
        for _ in range(2):
            adapter = load(hub.REPO, cache_dir=tmp_path / "cache")
        assert adapter.info.revision == hub.COMMIT and len(adapter) == 2
        assert sum("GET" in line and "/resolve/" in line for line in served.asked) == 2

    def test_what_is_beside_it_is_fetched_and_what_is_too_large_is_said(
        self, served: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("coremerge.formats.source.LARGEST", 100)
        small, large = (save({"w": torch.ones(n)}) for n in (1, 100))
        served.files |= {"tokenizer.json": b"{}", "spectrogram_head.safetensors": small, "odd.safetensors": large}
        served.files |= {"optimizer.pt": b"x", "runs/tokenizer.json": b"x", "README.md": b"x"}
        info = load(hub.REPO, cache_dir=tmp_path / "cache").info
        assert {name: file.read_bytes() for name, file in info.beside.items()} == {
            "tokenizer.json": b"{}", "spectrogram_head.safetensors": small,
        }  # fmt: skip
        assert info.warnings == ("odd.safetensors on the hub is not carried over: it is larger than a head or a table",)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert load(hub.REPO, cache_dir=tmp_path / "cache").info.beside == info.beside

    def test_weights_under_another_name_are_named(self, served: hub.Hub, tmp_path: Path) -> None:
        served.files["lora.safetensors"] = served.files.pop(WEIGHTS)
        served.files["optimizer.pt"] = b"x"
        with pytest.raises(SourceError, match=r"org/faulty: .*the config, but lora.safetensors\. .*name that file"):
            load(hub.REPO, cache_dir=tmp_path / "cache")
        served.files["adapter_model.bin"] = b"x"
        with pytest.raises(SourceError, match=r"but .*adapter_model.bin.*\. .*allow_pickle reads that"):
            load(hub.REPO, cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize(
        "name", ["401", "403", "404, of the revision", "500", "another body of that size", "no answer", "a login page"]
    )
    def test_a_refusal_and_then_the_right_files(self, served: hub.Hub, tmp_path: Path, name: str) -> None:
        served.fault, said = hub.FAULTS[name]
        start = time.monotonic()
        with pytest.raises(SourceError, match=r"org.{1,2}faulty.*: ") as refused:
            load(hub.REPO, cache_dir=tmp_path / "cache")
        assert said in str(refused.value) and refused.value.remedy and time.monotonic() - start < 5
        served.fault = None
        assert len(load(hub.REPO, cache_dir=tmp_path / "cache")) == 2
