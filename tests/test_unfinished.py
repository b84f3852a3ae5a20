"""A merge that stops at any moment goes on from there, to the same bytes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from coremerge import Recipe, merging
from coremerge.errors import ConfigError, OutputError, SourceError, TensorError
from coremerge.formats import atomic, journal, writer
from coremerge.formats.journal import Journal
from coremerge.merging import execute
from coremerge.pipeline import merge_files, prepare
from coremerge.unfinished import folder_of
from tiny import make_adapter, make_base

LAYERS = 5
WEIGHTS = "adapter_model.safetensors"


class StoppedError(Exception):
    pass


@pytest.fixture
def sources(tmp_path):
    return [make_adapter(tmp_path / name, seed=seed, layers=LAYERS) for seed, name in enumerate("ABC")]


@pytest.fixture
def base(tmp_path):
    """In one shard per layer."""
    folder = make_base(tmp_path / "base", LAYERS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    home = {key: f"model-{key.split('.')[2]}.safetensors" for key in tensors}
    for name in sorted(set(home.values())):
        held = {key: tensor for key, tensor in tensors.items() if home[key] == name}
        save_file(held, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stopping(moment):
    """Progress that stops the merge when it is told of something for the so many-th time."""
    times = iter(range(10**6))

    def tell(stage, done, count):
        if next(times) == moment:
            raise StoppedError

    return tell


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("into", [False, True])
def test_stopped_anywhere_it_ends_with_the_same_bytes(sources, base, tmp_path, into, monkeypatch):
    out, settings = tmp_path / "OUT", {"into": base if into else None, "threads": 1, "resume": True}
    told = []
    merge_files(sources, tmp_path / "WHOLE", **settings | {"resume": False}, progress=lambda *a: told.append(a))
    whole, solved = weights(tmp_path / "WHOLE"), []
    solve = merging.solve
    monkeypatch.setattr(merging, "solve", lambda names, *rest: solved.extend(names) or solve(names, *rest))
    first = next(i for i, (stage, _, _) in enumerate(told) if stage == "merging")
    for moment in range(first, len(told), 2):
        solved.clear()
        with pytest.raises(StoppedError):
            merge_files(sources, out, **settings, progress=stopping(moment))
        assert folder_of(out).is_dir() and not out.exists()
        merge_files(sources, out, **settings)
        assert weights(out) == whole and not folder_of(out).exists()
        assert len(solved) == len(set(solved)) == 2 * LAYERS
        merge_files(sources, out, **settings, overwrite=True)
        assert weights(out) == whole
        shutil.rmtree(out)


def test_files_that_are_complete_are_not_written_again(sources, base, tmp_path, monkeypatch):
    from coremerge.formats import into

    written = []
    write = into.IntoPlan._write_shard
    monkeypatch.setattr(
        into.IntoPlan, "_write_shard", lambda self, file, name, n: written.append(name) or write(self, file, name, n)
    )
    told = []
    merge_files(sources, tmp_path / "WHOLE", into=base, threads=1, progress=lambda *a: told.append(a))
    written.clear()
    with pytest.raises(StoppedError):
        merge_files(sources, tmp_path / "OUT", into=base, threads=1, resume=True, progress=stopping(len(told) - 3))
    last = written[-1]
    merge_files(sources, tmp_path / "OUT", into=base, threads=1, resume=True)
    assert written == sorted([*set(written), last])  # only the unfinished one twice
    assert weights(tmp_path / "OUT") == weights(tmp_path / "WHOLE")


def stopped(sources, out, **settings):
    with pytest.raises(StoppedError):
        merge_files(sources, out, threads=1, resume=True, progress=stopping(12), **settings)


@pytest.mark.parametrize("what", ["recipe", "input", "order", "dtype", "version", "torch", "width", "base"])
def test_what_was_begun_with_something_else_is_refused(sources, base, tmp_path, what, monkeypatch):
    out = tmp_path / "OUT"
    settings = {"into": base} if what == "base" else {}
    stopped(sources, out, **settings)
    recipe = Recipe(scale=0.5) if what == "recipe" else Recipe(dtype="bfloat16") if what == "dtype" else None
    if what == "input":
        make_adapter(sources[1], seed=7, layers=LAYERS)
    if what == "version":
        monkeypatch.setattr("coremerge.__version__", "0.0.0")
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.0")
    if what == "width":
        settings["vera_width"] = 48
    if what == "base":
        (base / "config.json").write_text('{"model_type": "llama", "hidden_size":  24}')
    given = sources[::-1] if what == "order" else sources
    with pytest.raises(ConfigError, match="other adapters, inputs or settings") as raised:
        merge_files(given, out, recipe, resume=True, **settings)
    assert str(folder_of(out)) in str(raised.value)
    (folder_of(out) / "journal").unlink()
    merge_files(given, out, recipe, resume=True, **settings)
    merge_files(given, tmp_path / "WHOLE", recipe, **settings)
    assert weights(out) == weights(tmp_path / "WHOLE") and not folder_of(out).exists()


def test_a_failure_leaves_what_resume_needs_and_nothing_else(sources, tmp_path, monkeypatch):
    out = tmp_path / "OUT"

    def fail(*_, **__):
        raise TensorError("no")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_module", fail)
        with pytest.raises(TensorError):
            merge_files(sources, out, resume=True)
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(TensorError):
            merge_files(sources, out)
        assert {path.name for path in tmp_path.iterdir()} == before == {"A", "B", "C", folder_of(out).name}
    merge_files(sources, out, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"A", "B", "C", "OUT"}


def test_two_merges_into_one_folder(sources, tmp_path):
    out = tmp_path / "OUT"
    stopped(sources, out)
    import fcntl

    with (folder_of(out) / "journal").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            merge_files(sources, out, resume=True)
    merge_files(sources, out, resume=True)
    assert torch.is_tensor(load_file(out / WEIGHTS).popitem()[1])


def test_an_output_that_is_in_use_is_refused_first(sources, tmp_path):
    with pytest.raises(OutputError, match="exists"):
        merge_files(sources, sources[0], resume=True)
    assert not folder_of(sources[0]).exists()


def test_numbers_survive_the_journal(sources, tmp_path):
    stopped(sources, tmp_path / "OUT")
    import re

    journal = folder_of(tmp_path / "OUT") / "journal"
    mark = re.search(rb'"mark": "(\w+)"', journal.read_bytes())[1].decode()
    with Journal(journal, mark) as held:
        solved = [held.tensors(part) for part in held.parts if "module" in part.facts]
    assert solved and all(t.dtype == torch.float64 for tensors in solved for t in tensors.values())


def test_what_solve_does_is_not_resumed(sources, tmp_path):
    with pytest.raises(ValueError, match="not resumed"):
        prepare(sources, Recipe()).run(tmp_path / "OUT", solve=execute, resume=True)


def test_a_folder_that_another_process_has_just_removed_is_refused(tmp_path, monkeypatch):
    lock = journal._lock

    def late(descriptor, path):
        lock(descriptor, path)
        path.unlink()

    monkeypatch.setattr(journal, "_lock", late)
    with pytest.raises(OutputError, match="another process is at work"):
        Journal(tmp_path / "journal", "mark")


def test_what_a_run_left_that_was_killed_in_its_last_moment_is_tidied_away(sources, tmp_path, monkeypatch):
    out = tmp_path / "OUT"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        merge_files(sources, out, resume=True)
    assert folder_of(out).exists()
    with pytest.raises(OutputError, match="not empty"):
        merge_files(sources, out, resume=True)
    assert not folder_of(out).exists() and out.exists()


@pytest.mark.parametrize("moment", ["between", "after"])
def test_killed_while_the_old_result_gives_way_it_can_be_run_again(sources, tmp_path, monkeypatch, moment):
    out = tmp_path / "OUT"
    merge_files(sources, out, Recipe(scale=0.5))
    swap = atomic._swap

    def killed(partial, target, overwrite):
        if moment == "after":
            swap(partial, target, overwrite)
        else:
            target.rename(tmp_path / ".OUT.1.old")
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_swap", killed)
        with pytest.raises(SystemExit):
            merge_files(sources, out, resume=True, overwrite=True)
    merge_files(sources, out, resume=True, overwrite=True)
    merge_files(sources, tmp_path / "WHOLE")
    assert weights(out) == weights(tmp_path / "WHOLE") and not folder_of(out).exists()


@pytest.mark.parametrize("facts", [{}, {"report": {}, "of": [1, 1]}, {"amplification": 10**400}])
def test_a_record_that_makes_no_sense_is_refused(sources, tmp_path, facts):
    stopped(sources, tmp_path / "OUT")
    file = folder_of(tmp_path / "OUT") / "journal"
    mark = json.loads(file.read_bytes().partition(b"\n")[0])["mark"]
    with Journal(file, mark) as made:
        whole = made.parts[0].facts if made.parts and "amplification" in facts else {}
        made.add({**whole, "module": "x", **facts}, {})
    for _ in range(2):  # and the lock is let go
        with pytest.raises(SourceError, match="makes no sense"):
            merge_files(sources, tmp_path / "OUT", resume=True)
