"""Adapters and base models behind URLs: in a store that lives in memory, and on a web server on this machine."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save

from coremerge import load
from coremerge.batch import run_batch
from coremerge.errors import CoremergeError, MismatchError, SourceError, UnsupportedError
from coremerge.formats import remote_files
from coremerge.formats.base_model import _from_base
from coremerge.formats.base_weights import open_base
from coremerge.formats.checkpoint import Options
from coremerge.formats.remote_files import RemoteFolder
from coremerge.formats.source import locate
from coremerge.hashing import stamp_of
from coremerge.pipeline import merge_files, prepare
from coremerge.recipe import Recipe, read_recipe
from coremerge.remote import opened, order_of
from posted import Posted
from tiny import make_adapter, make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COREMERGE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    made = fsspec.filesystem("memory")
    made.store.clear()
    made.pseudo_dirs[:] = [""]
    yield made
    made.store.clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that leave the store."""
    told: list[str] = []
    real = MemoryFileSystem.get_file

    def get_file(self: MemoryFileSystem, path: str, *given: Any, **more: Any) -> None:
        told.append(path)
        real(self, path, *given, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return told


def put(store: MemoryFileSystem, folder: Path, place: str) -> str:
    for file in folder.rglob("*"):
        if file.is_file():
            store.pipe(f"{place}/{file.relative_to(folder)}", file.read_bytes())
    return f"memory:/{place}"


@pytest.fixture
def math(store: MemoryFileSystem, tmp_path: Path) -> str:
    return put(store, make_adapter(tmp_path / "made" / "math", seed=1), "/b/math")


@pytest.fixture
def code(store: MemoryFileSystem, tmp_path: Path) -> str:
    return put(store, make_adapter(tmp_path / "made" / "code", seed=2), "/b/code")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


class TestAdapters:
    """Folders and files of a store."""

    def test_a_folder_a_file_and_a_config(self, math: str, tmp_path: Path, kept: Path) -> None:
        here = load(tmp_path / "made" / "math")
        for url in (math, f"{math}/", f"{math}/{WEIGHTS}", f"{math}/{CONFIG}", math.replace("memory", "MEMORY")):
            adapter = load(url)
            assert (adapter.name, adapter.info.source, adapter.info.revision) == ("math", url, None)
            assert [file.name for file in adapter.info.files] == [CONFIG, WEIGHTS]
            assert all(kept in file.parents for file in adapter.info.files)
            assert all(torch.equal(here[name].left, adapter[name].left) for name in here)

    def test_a_file_of_another_name(self, store: MemoryFileSystem, math: str) -> None:
        store.mv(f"/b/math/{WEIGHTS}", "/b/math/step-100.safetensors")
        assert load(f"{math}/step-100.safetensors").name == "step-100"
        with pytest.raises(SourceError, match=rf"memory://b/math: {WEIGHTS}: no {WEIGHTS} there"):
            load(math)

    def test_slashes_are_kept(self, store: MemoryFileSystem, math: str, tmp_path: Path) -> None:
        url = put(store, make_adapter(tmp_path / "other", seed=3), "/b//math")
        assert url == "memory://b//math" and load(url).info.files != load(math).info.files

    def test_what_is_fetched_stays_until_it_changes(
        self, store: MemoryFileSystem, math: str, tmp_path: Path, fetched: list[str]
    ) -> None:
        first = load(math)
        stamps = [stamp_of(file) for file in first.info.files]
        again = load(math)
        assert again.info.files == first.info.files and [stamp_of(file) for file in again.info.files] == stamps
        assert fetched == [f"/b/math/{CONFIG}", f"/b/math/{WEIGHTS}"]
        made = make_adapter(tmp_path / "other", seed=7)
        store.pipe(f"/b/math/{WEIGHTS}", (made / WEIGHTS).read_bytes())  # of the same size
        changed = load(math)
        assert fetched[2:] == [f"/b/math/{WEIGHTS}"] and changed.info.files[0] == first.info.files[0]
        assert any(not torch.equal(changed[name].left, again[name].left) for name in again)

    def test_a_store_that_tells_nothing_is_asked_each_time(
        self, math: str, fetched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote_files, "_TELLING", frozenset())
        first, again = load(math), load(math)
        assert len(fetched) == 4 and again.info.files == first.info.files and again.info.stamps == first.info.stamps

    def test_what_the_cache_lost_is_fetched_again(self, math: str, fetched: list[str]) -> None:
        weights = load(math).info.files[1]
        weights.write_bytes(weights.read_bytes()[:-1])
        assert len(load(math)) == 4 and len(fetched) == 3

    def test_two_at_once_fetch_once(self, math: str, fetched: list[str]) -> None:
        found: list[Any] = []
        workers = [threading.Thread(target=lambda: found.append(locate(math))) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 6 and len({(one.config, one.weights) for one in found}) == 1 and len(fetched) == 2

    def test_a_pickle_is_asked_for(self, store: MemoryFileSystem, math: str, fetched: list[str]) -> None:
        store.mv(f"/b/math/{WEIGHTS}", "/b/math/adapter_model.bin")
        for url in (math, f"{math}/adapter_model.bin"):
            with pytest.raises(SourceError, match="this is a pickle"):
                load(url)
        assert not fetched
        assert locate(math, allow_pickle=True).weights[0].name == "adapter_model.bin"

    @pytest.mark.parametrize("url", ["memory://b/none", "memory://b", "memory://none/x.safetensors", "memory://"])
    def test_nothing_there(self, math: str, url: str) -> None:
        with pytest.raises(SourceError, match=rf"{url}: {CONFIG}: no {CONFIG} there\. Check the spelling"):
            load(url)

    def test_a_path_is_no_url(self) -> None:
        with pytest.raises(SourceError, match=r"no such file or folder.*a URL is given as text"):
            load(Path("memory://b/math"))

    def test_what_is_beside_it_is_fetched(self, store: MemoryFileSystem, math: str, fetched: list[str]) -> None:
        for name in ("tokenizer.json", "value_head.bin", "optimizer.pt", "sub/tokenizer.json"):
            store.pipe(f"/b/math/{name}", b"{}")
        info = load(math).info
        assert {name: file.read_bytes() for name, file in info.beside.items()} == {
            "tokenizer.json": b"{}", "value_head.bin": b"{}",
        }  # fmt: skip
        assert len(fetched) == 4 and info.notes == ()

    def test_a_store_that_shows_no_list_is_read_all_the_same(self, math: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("no list")

        monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
        (note,) = load(math).info.notes
        assert note == "its store lists no files: a tokenizer or a head beside it is not looked for"

    def test_shards_are_read_whole(self, store: MemoryFileSystem, math: str) -> None:
        whole = load(math)
        tensors = load_file(whole.info.files[1])
        home = {}
        for at, part in enumerate((list(tensors)[:3], list(tensors)[3:]), 1):
            name = f"adapter_model-0000{at}-of-00002.safetensors"
            store.pipe(f"/b/math/{name}", save({key: tensors[key] for key in part}))
            home |= dict.fromkeys(part, name)
        store.rm(f"/b/math/{WEIGHTS}")
        for index in (False, True):
            if index:
                store.pipe(f"/b/math/{WEIGHTS}.index.json", json.dumps({"weight_map": home}).encode())
            named = ["", "/adapter_model-00002-of-00002.safetensors", *([f"/{WEIGHTS}.index.json"] if index else [])]
            for one in named:
                found = load(math + one)
                assert found.name == "math" and found.modules == whole.modules
        store.rm("/b/math/adapter_model-00001-of-00002.safetensors")
        with pytest.raises(
            SourceError, match=r"one of 2 shards: adapter_model-00001-of-00002.safetensors is not beside"
        ):
            load(math)

    @pytest.mark.parametrize(
        ("scheme", "extra"),
        [("s3", "s3"), ("gcs", "gs"), ("az", "az"), ("abfss", "az"), ("oci", "oci"), ("oss", "oss")],
    )
    def test_a_package_that_is_missing_comes_with_an_extra(self, scheme: str, extra: str) -> None:
        with pytest.raises(SourceError, match=rf"{scheme}:// needs a package .*\. pip install .*\[{extra}\]"):
            load(f"{scheme}://bucket/a")

    def test_a_web_server_needs_an_extra_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "aiohttp", None)
        with pytest.raises(SourceError, match=r"https:// needs a package that is not installed\. .*\[http\]"):
            load("https://host/a")

    def test_a_disk_that_is_full(self, math: str, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(MemoryFileSystem, "get_file", full)
        with pytest.raises(SourceError, match=rf"math/{CONFIG}: cannot be kept in {kept}: No space.*COREMERGE_CACHE"):
            load(math)

    def test_a_cache_that_is_no_folder(self, math: str, kept: Path) -> None:
        kept.write_text("")
        with pytest.raises(SourceError, match="cannot be kept in"):
            load(math)

    @pytest.mark.parametrize("by", [-1, 1])
    def test_other_than_the_announced_size(
        self, store: MemoryFileSystem, math: str, monkeypatch: pytest.MonkeyPatch, kept: Path, by: int
    ) -> None:
        data = store.cat(f"/b/math/{CONFIG}")
        size = len(data)
        said = f"cut short: {size - 1} of {size} bytes came" if by < 0 else f"more than the {size} bytes"

        def get_file(self: object, path: str, local: str, callback: Any) -> None:
            sent = (data + b" ")[: size + by]
            Path(local).write_bytes(sent)
            callback.relative_update(len(sent))

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(SourceError, match=said):
            load(math)
        assert not [path for path in kept.rglob("*") if path.is_file() and path.parent.name != "locks"]

    def test_what_changes_while_it_is_fetched(
        self, store: MemoryFileSystem, math: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = MemoryFileSystem.get_file

        def get_file(self: MemoryFileSystem, path: str, *given: Any, **more: Any) -> None:
            real(self, path, *given, **more)
            if path.endswith(WEIGHTS):
                store.pipe(f"/b/math/{CONFIG}", store.cat(f"/b/math/{CONFIG}"))

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(SourceError, match=rf"math/{CONFIG}: changed while it was fetched"):
            load(math)

    @pytest.mark.parametrize(
        "place", ["/b/..", "/b/../../x", "/b/\x1b[31m", "/b/.hidden", "/b/" + "x" * 300, "/b/é\\x"]
    )
    def test_no_name_leads_out_of_the_cache(
        self, store: MemoryFileSystem, tmp_path: Path, kept: Path, place: str
    ) -> None:
        made = make_adapter(tmp_path / "made", seed=1)
        (made / WEIGHTS).rename(made / "..\\é.safetensors")
        url = put(store, made, place)
        before = {path for path in tmp_path.rglob("*") if kept not in path.parents}
        load(f"{url}/..\\é.safetensors")
        assert {path for path in tmp_path.rglob("*") if kept not in path.parents} == before | {kept}
        assert all(path.resolve().is_relative_to(kept) and path.name.isascii() for path in kept.rglob("*"))


class TestMerges:
    """All that is done with adapters in files."""

    def test_the_bytes_are_those_of_local_files(self, math: str, code: str, tmp_path: Path) -> None:
        local = [tmp_path / "made" / name for name in ("math", "code")]
        merge_files(local, tmp_path / "here", Recipe(weights={"math": 0.5}))
        told: list[str] = []
        merged = merge_files(
            [math, code], tmp_path / "there", Recipe(weights={math: 0.5}), progress=lambda *part: told.append(part[0])
        )
        assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / "there") and "fetching" in told
        assert list(merged.plan.adapters) == ["math", "code"]
        record = json.loads((tmp_path / "there" / "coremerge.json").read_text())
        assert [entry["source"] for entry in record["inputs"]] == [math, code]
        card = (tmp_path / "there" / "README.md").read_text()
        assert f"| `math` | `{math}` |" in card and f"- model: {code}" in card

    def test_the_folder_above_tells_two_apart(self, math: str, code: str, store: MemoryFileSystem) -> None:
        for name in ("math", "code"):
            for file in (CONFIG, WEIGHTS):
                store.mv(f"/b/{name}/{file}", f"/b/{name}/checkpoint-9/{file}")
        assert [*prepare([f"{math}/checkpoint-9", f"{code}/checkpoint-9"]).plan.adapters] == [
            "math/checkpoint-9",
            "code/checkpoint-9",
        ]

    def test_a_recipe_names_them(self, math: str, code: str, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": [math, {"model": code}]}))
        assert read_recipe(tmp_path / "r.yaml").models == (math, code)

    def test_a_manifest_names_them(self, math: str, code: str, store: MemoryFileSystem, tmp_path: Path) -> None:
        local = tmp_path / "made" / "code"
        base = put(store, make_base(tmp_path / "base"), "/base")
        sets = {"urls": [math, local.as_uri()], "model": {"models": [math], "into": base}}
        (tmp_path / "m.yaml").write_text(yaml.safe_dump({"sets": sets}))
        first = run_batch(tmp_path / "m.yaml", tmp_path / "OUT", threads=1)
        assert first.counts == {"done": 2}
        assert run_batch(tmp_path / "m.yaml", tmp_path / "OUT", threads=1).counts == {"skipped": 2}
        store.pipe(f"/b/math/{WEIGHTS}", (local / WEIGHTS).read_bytes())
        again = run_batch(tmp_path / "m.yaml", tmp_path / "OUT", threads=1)
        assert again.counts == {"failed": 2} and "math" in str(again.rows[0].error)

    def test_an_initial_adapter(self, math: str, store: MemoryFileSystem, tmp_path: Path) -> None:
        url = put(store, make_adapter(tmp_path / "trained", seed=4, init_lora_weights="pissa"), "/b/trained")
        prepared = prepare([url], initial={"trained": math})
        assert prepared.plan.adapters["trained"].modules.popitem()[1].rank == 8
        assert order_of(prepared, "cpu").given.initial == {"trained": math}

    def test_workers_fetch_for_themselves(
        self, math: str, code: str, tmp_path: Path, kept: Path, fetched: list[str]
    ) -> None:
        merge_files([math, code], tmp_path / "here")
        order = order_of(prepare([math, f"file://{tmp_path}/made/code"]), "cpu")
        assert order.given.sources == (math, str(tmp_path / "made" / "code"))
        shutil.rmtree(kept)
        assert [*opened(pickle.loads(pickle.dumps(order))).plan.adapters] == ["math", "code"] and len(fetched) == 6
        merge_files([math, code], tmp_path / "there", executor=Posted())
        assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / "there")

    def test_a_worker_that_finds_another_file_says_so(self, math: str, store: MemoryFileSystem, tmp_path: Path) -> None:
        order = order_of(prepare([math]), "cpu")
        store.pipe(f"/b/math/{WEIGHTS}", (make_adapter(tmp_path / "other", seed=7) / WEIGHTS).read_bytes())
        with pytest.raises(MismatchError, match=rf"{math}: has other content on"):
            opened(order)


class TestBases:
    """Base models, all files of which are needed."""

    @pytest.fixture
    def base(self, store: MemoryFileSystem, tmp_path: Path) -> str:
        folder = make_base(tmp_path / "base")
        for name in ("tokenizer.json", "1_Pooling/config.json", "onnx/config.json", ".git/x.json", "notes.xyz"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        return put(store, folder, "/models/tiny")

    def test_a_model_is_written(self, base: str, math: str, tmp_path: Path, fetched: list[str]) -> None:
        merged = merge_files([math], tmp_path / "out", into=base)
        merge_files([math], tmp_path / "here", into=tmp_path / "base")
        assert merged.into == base and bytes_of(tmp_path / "out") == bytes_of(tmp_path / "here")
        assert {"tokenizer.json", "1_Pooling", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
        wanted = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
        assert [path for path in fetched if "models" in path] == [f"/models/tiny/{name}" for name in wanted]
        assert f"`{base}`" in (tmp_path / "out" / "README.md").read_text()
        assert json.loads((tmp_path / "out" / "coremerge.json").read_text())["recipe"]

    def test_one_that_changed_is_another(self, base: str, store: MemoryFileSystem, fetched: list[str]) -> None:
        first = open_base(base)
        assert open_base(f"{base}/").folder == first.folder and len(fetched) == 4
        store.pipe("/models/tiny/config.json", b'{"hidden_size": 25}')
        assert open_base(base).config == {"hidden_size": 25} and first.config != open_base(base).config

    def test_names_that_lead_elsewhere(self, base: str, store: MemoryFileSystem, fetched: list[str]) -> None:
        store.pipe("/models/tiny/a\\..\\x.json", b"{}")
        with pytest.raises(SourceError, match=r"x\.json.*not the name of a file"):
            RemoteFolder(base).fetch_all(["*.json"], ())
        store.rm("/models/tiny/a\\..\\x.json")
        store.pipe("/models/tiny/../x.json", b"{}")
        assert not list(RemoteFolder(base).fetch_all(["*.json"], ()).parent.rglob("x.json"))
        assert not any(".." in path for path in fetched)

    def test_no_model_there(self, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(SourceError, match=r"memory://none: no files of a model are there\. Give the folder"):
            open_base("memory://none")
        monkeypatch.setattr(remote_files, "MOST_FILES", 3)
        with pytest.raises(SourceError, match="4 files, more than a model has"):
            open_base(base)
        monkeypatch.undo()
        monkeypatch.setattr(remote_files, "_TELLING", frozenset())
        with pytest.raises(SourceError, match="its store does not tell when it changes"):
            open_base(base)

    def test_the_widths_of_vera_are_in_its_config(self, base: str, fetched: list[str]) -> None:
        outs = {"model.layers.0.self_attn.q_proj": 24}
        for url in (base, f"{base}/config.json"):
            assert _from_base(Options(url, None, None, None), outs) == outs
        assert fetched == ["/models/tiny/config.json"]
        with pytest.raises(SourceError, match=r"memory://none: no config\.json there"):
            _from_base(Options("memory://none", None, None, None), outs)

    def test_a_web_server_has_no_list(self) -> None:
        with pytest.raises(UnsupportedError, match="a web server has no list of the files of a model"):
            open_base("https://127.0.0.1/model")


Answer = Callable[["Web", bytes], None]


class Web(BaseHTTPRequestHandler):
    """Serves files by name, or errs."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]
    fault: Answer | None
    login: str | None

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.login and self.headers.get("Authorization") != self.login:
            return self.answer(401)
        body = self.files.get(self.path)
        if self.fault:
            return self.fault(self, body or b"")
        return self.answer(404) if body is None else self.answer(200, body, {"ETag": f'"{hash(body)}"'})

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def answer(
        self, code: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:length])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def cut(web: Web, body: bytes) -> None:
    web.answer(200, body, {"ETag": "1"}, len(body) // 2)


def slow(web: Web, body: bytes) -> None:
    time.sleep(0.6)
    web.close_connection = True


def to_a_signed_address(web: Web, body: bytes) -> None:
    web.answer(302, headers={"Location": "/nowhere?sig=AbC"}) if "?" not in web.path else web.answer(500)


class TestWeb:
    """A web server on this machine."""

    @pytest.fixture
    def web(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Web]]:
        folder = make_adapter(tmp_path / "made" / "math", seed=1)
        files = {f"/math/{name}": (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        served = type("Served", (Web,), {"files": files, "asked": [], "fault": None, "login": None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), served)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(remote_files, "PATIENCE", 0.3)
        served.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield served
        server.shutdown()
        server.server_close()

    def test_an_adapter(self, web: Any, tmp_path: Path) -> None:
        for url in (f"{web.url}/math", f"{web.url}/math/{WEIGHTS}"):
            assert load(url).name == "math"
        assert sum(line.startswith("GET") for line in web.asked) == 2
        web.files[f"/math/{WEIGHTS}"] = (make_adapter(tmp_path / "other", seed=5) / WEIGHTS).read_bytes()
        load(f"{web.url}/math")
        assert sum(line.startswith("GET") for line in web.asked) == 3

    def test_nothing_there(self, web: Any) -> None:
        with pytest.raises(SourceError, match=rf"/none: {CONFIG}: no {CONFIG} there"):
            load(f"{web.url}/none")

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (lambda web, _: web.answer(403), "may not be read, or is not there: 403.*netrc"),
            (lambda web, _: web.answer(401), "may not be read, or is not there: 401.*netrc"),
            (lambda web, _: web.answer(500), "cannot be fetched: 500.*try again"),
            (
                lambda web, _: web.answer(200, b"<p>", {"Content-Type": "text/html; charset=utf-8"}),
                "a web page answers",
            ),
            (lambda web, _: web.answer(302, headers={"Location": web.path}), "cannot be fetched: .*"),
            (to_a_signed_address, "cannot be fetched: 500.*"),
            (cut, "cannot be fetched|cut short"),
            (slow, "no answer in time"),
        ],
        ids=["403", "401", "500", "page", "loop", "signed", "cut", "slow"],
    )
    def test_a_refusal_and_then_the_right_files(self, web: Any, kept: Path, fault: Answer, said: str) -> None:
        web.fault = staticmethod(fault)
        with pytest.raises(SourceError, match=rf"^{web.url}/math/{CONFIG}: ({said})") as refused:
            load(f"{web.url}/math")
        assert "AbC" not in repr(vars(refused.value)) and refused.value.remedy
        assert not [path for path in kept.rglob("*") if path.is_file() and path.parent.name != "locks"]
        web.fault = None
        assert len(load(f"{web.url}/math")) == 4

    def test_nobody_there(self) -> None:
        with pytest.raises(SourceError, match="cannot be fetched: "):
            load("http://127.0.0.1:9/math")

    @pytest.mark.parametrize("how", ["in the address", "netrc"])
    def test_a_login_is_used_and_not_told(
        self, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        web.login = "Basic bWU6aHVzaC1odXNo"  # me:hush-hush
        url = f"{web.url}/math"
        if how == "netrc":
            (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush-hush")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        else:
            monkeypatch.setenv("NETRC", str(tmp_path / "none"))
            with pytest.raises(SourceError, match="may not be read"):
                load(url)
            url = url.replace("://", "://me:hush-hush@")
        merge_files([url], tmp_path / "out", command=["coremerge", "merge", url])
        told = [file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix in (".md", ".json")]
        assert any("127.0.0.1" in text for text in told) and not any("hush" in text for text in told)
        web.login = "other"
        with pytest.raises(CoremergeError) as refused:
            load(url)
        assert "hush" not in str(refused.value)
