"""Many merges in one go."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil

import pytest
import torch
import yaml

from coremerge import Recipe, batch, hashing, load
from coremerge.batch import jobs_of, run_batch, run_job
from coremerge.errors import ConfigError, CoremergeError, OutputError
from coremerge.manifest import Manifest
from coremerge.pipeline import merge_files
from tiny import make_adapter, make_base

TIES = {"merge_method": "ties", "parameters": {"density": 0.2}, "weights": {"A": 0.5}}
RECIPES = {"default": {}, "ties": TIES}
SETS = {"pair": ["A", "B"], "all": {"models": ["A", "B", "C"]}}
ALL = ["pair/default", "pair/ties", "all/default", "all/ties"]


class StoppedError(BaseException):
    """As Ctrl-C is, no error."""


@pytest.fixture
def folder(tmp_path):
    """With the adapters A, B and C."""
    for seed, name in enumerate("ABC"):
        make_adapter(tmp_path / name, 3 + seed, seed=seed)
    return tmp_path


@pytest.fixture
def manifest(folder):
    return write(folder)


def write(folder, sets=SETS, recipes=RECIPES, **rest):
    path = folder / "m.yaml"
    path.write_text(yaml.safe_dump({"recipes": recipes, "sets": sets, **rest}, sort_keys=False))
    return path


def run(manifest, **settings):
    return run_batch(manifest, manifest.parent / "OUT", threads=1, **settings)


def statuses(report):
    return {row.name: row.status for row in report.rows}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_every_recipe_on_every_set(manifest, folder):
    told = []
    report = run(manifest, progress=lambda *part: told.append(part))
    assert statuses(report) == dict.fromkeys(ALL, "done") and not report.failed
    for row in report.rows:
        assert row.bytes == (folder / "OUT" / row.name / "adapter_model.safetensors").stat().st_size
        assert load(folder / "OUT" / row.name)
    assert told[0] == ("pair/default", 0, 4) and told[-1] == ("all/ties: writing 4/4", 3, 4)
    assert report.to_dict()["counts"] == {"done": 4} and json.dumps(report.to_dict())


def test_a_result_is_what_merge_makes_of_the_same(manifest, folder):
    run(manifest, only=["all/*"])
    sources = [str(folder / name) for name in "ABC"]
    recipe = Recipe(method="ties", parameters={"density": 0.2}, weights={"A": 0.5})
    merge_files(sources, folder / "alone", recipe)
    assert files(folder / "OUT" / "all" / "ties") == files(folder / "alone")


def test_a_rerun_does_what_is_missing_and_touches_nothing_else(manifest, folder):
    run(manifest)
    shutil.rmtree(folder / "OUT" / "pair" / "ties")
    shutil.rmtree(folder / "OUT" / "all" / "default")
    before = times(folder / "OUT" / "pair" / "default") | times(folder / "OUT" / "all" / "ties")
    report = run(manifest)
    assert statuses(report) == dict(zip(ALL, ["skipped", "done", "done", "skipped"], strict=True))
    assert before == times(folder / "OUT" / "pair" / "default") | times(folder / "OUT" / "all" / "ties")
    assert all(row.bytes for row in report.rows)


def test_results_may_be_moved_with_their_inputs(manifest, folder):
    run(manifest, only=["pair/ties"])
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)
    assert statuses(run(moved / "m.yaml", only=["pair/ties"])) == {"pair/ties": "skipped"}


def test_another_input_is_noticed_though_it_has_the_same_size(manifest, folder):
    run(manifest)
    make_adapter(folder / "C", 5, seed=9)
    report = run(manifest)
    assert statuses(report) == dict(zip(ALL, ["skipped", "skipped", "failed", "failed"], strict=True))
    error = report.failed[0].error
    assert f"{folder / 'OUT/all/default'}: is there already, but of something else" in error
    assert "C has changed: adapter_model.safetensors" in error and "--overwrite" in error
    assert statuses(run(manifest, overwrite=True)) == dict(
        zip(ALL, ["skipped", "skipped", "done", "done"], strict=True)
    )
    assert set(statuses(run(manifest)).values()) == {"skipped"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipes": {"default": {}, "ties": TIES | {"seed": 1}}}, "seed was 0, not 1"),
        ({"recipes": {"default": {}, "ties": TIES | {"weights": {"A": 1}}}}, 'weights was {"A": 0.5}, not {"A": 1.0}'),
        ({"recipes": {"default": {}, "ties": TIES | {"dtype": "bf16"}}}, "dtype was "),
        ({"sets": {**SETS, "pair": ["A", "C"]}}, "made of A, B, not of A, C"),
        ({"sets": {**SETS, "pair": ["B", "A"]}}, "made of A, B, not of B, A"),
        ({"sets": {**SETS, "pair": {"models": ["A", "B"], "into": "base"}}}, "holds no weights|exists"),
    ],
)
def test_another_recipe_or_set_is_noticed(manifest, folder, change, said):
    make_base(folder / "base")
    run(manifest, only=["pair/ties"])
    report = run(write(folder, **change), only=["pair/ties"])
    assert re.search(said, report.failed[0].error)


def test_another_version_is_noticed(manifest, monkeypatch):
    run(manifest, only=["pair/ties"])
    monkeypatch.setattr("coremerge.__version__", "9.9")
    assert "made by version 0.1.0, this is 9.9" in run(manifest, only=["pair/ties"]).failed[0].error


@pytest.mark.parametrize("record", ["{}", '{"format": "coremerge.merge.1"}', "["])
def test_a_record_that_says_too_little_is_no_reason_to_skip(manifest, folder, record):
    run(manifest, only=["pair/ties"])
    (folder / "OUT/pair/ties/coremerge.json").write_text(record)
    assert run(manifest, only=["pair/ties"]).failed
    assert not run(manifest, only=["pair/ties"], overwrite=True).failed


def test_a_changed_base_is_noticed(folder):
    base = make_base(folder / "base")
    manifest = write(folder, {"model": {"models": ["A", "B"], "into": "base"}}, {"x": {}})
    assert statuses(run(manifest)) == {"model/x": "done"}
    assert (folder / "OUT/model/x/model.safetensors").exists()
    assert statuses(run(manifest)) == {"model/x": "skipped"}
    later = (folder / "OUT/model/x/coremerge.json").stat().st_mtime_ns + 10**9
    os.utime(base / "model.safetensors", ns=(later, later))
    assert "base has changed since: model.safetensors" in run(manifest).failed[0].error


def test_a_job_that_fails_does_not_stop_the_others(folder):
    make_adapter(folder / "nan", extra={}, seed=5, dtype=torch.float16, alpha=float("nan"))
    sets = {"gone": ["A", "nowhere"], "nan": ["A", "nan"], "pair": ["A", "B"]}
    recipes = {"other": {"weights": {"C": 1}}, "default": {}}
    report = run(write(folder, sets, recipes))
    found = statuses(report)
    assert found.pop("pair/default") == "done" and set(found.values()) == {"failed"}
    why = {row.name: row.error for row in report.failed}
    assert f"{folder / 'nowhere'}: no such file or folder" in why["gone/default"]
    assert "nan" in why["nan/default"] and "C" in why["pair/other"]
    assert sorted(path.name for path in (folder / "OUT").iterdir()) == ["pair"]


def test_a_bug_is_a_failure_that_names_itself(manifest, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("no")

    monkeypatch.setattr("coremerge.pipeline.execute", broken)
    assert {row.error for row in run(manifest).rows} == {"ZeroDivisionError: no"}


@pytest.mark.parametrize("stage", ["reading", "merging", "writing"])
def test_stopped_in_the_middle_it_leaves_whole_results_and_goes_on(manifest, folder, stage):
    def stop(label, done, count):
        if label.startswith(f"all/default: {stage}"):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(manifest, progress=stop)
    left = [path.relative_to(folder / "OUT").as_posix() for path in (folder / "OUT").rglob("*") if path.is_dir()]
    assert sorted(left) == ["pair", "pair/default", "pair/ties"]
    assert statuses(run(manifest)) == dict(zip(ALL, ["skipped", "skipped", "done", "done"], strict=True))


def test_a_dry_run_writes_nothing(manifest, folder):
    before = times(folder)
    report = run(manifest, dry_run=True)
    assert set(statuses(report).values()) == {"planned"} and all(row.bytes for row in report.rows)
    assert times(folder) == before
    run(manifest, only=["all/*"])
    make_adapter(folder / "C", 5, seed=9)
    before = times(folder)
    kinds = dict(zip(ALL, ["planned", "planned", "failed", "failed"], strict=True))
    assert statuses(run(manifest, dry_run=True)) == kinds
    kinds |= {"all/default": "planned", "all/ties": "planned"}
    assert statuses(run(manifest, dry_run=True, overwrite=True)) == kinds
    assert times(folder) == before


def test_headers_and_hashes_are_read_once(manifest, folder, monkeypatch):
    read, hashed = [], []
    monkeypatch.setattr(batch, "load", lambda source, **how: read.append(source) or load(source, **how))
    slow = hashing._sha256
    monkeypatch.setattr(hashing, "_sha256", lambda path, stop: hashed.append(path.parent.name) or slow(path, stop))
    run(manifest)
    assert read == [str(folder / name) for name in "ABC"]
    assert sorted(hashed) == ["A", "A", "B", "B", "C", "C"]


def test_an_input_that_changes_during_the_run_is_read_again(manifest, folder):
    def change(label, done, count):
        if label == "all/default":
            make_adapter(folder / "A", 7, seed=8)

    run(manifest, progress=change)
    assert statuses(run(manifest)) == dict(zip(ALL, ["failed", "failed", "skipped", "skipped"], strict=True))


def test_only_some(manifest):
    assert [*statuses(run(manifest, only=["pair/*", "all/ties"]))] == ["pair/default", "pair/ties", "all/ties"]
    with pytest.raises(ConfigError, match=r'only = "pair": no such job\. Jobs: pair/default, pair/ties'):
        run(manifest, only=["pair"])


def test_jobs_by_name(folder):
    jobs = [{"set": "pair", "recipe": "ties", "name": "best"}, {"set": "all"}]
    assert statuses(run(write(folder, jobs=jobs))) == {"best": "done", "all/default": "done"}
    assert (folder / "OUT" / "best" / "README.md").exists()


def test_a_job_travels_to_another_process_and_its_row_back(manifest, folder):
    (job, *_) = jobs_of(manifest, folder / "OUT", threads=1)
    row = run_job(pickle.loads(pickle.dumps(job)))
    assert pickle.loads(pickle.dumps(row)).status == "done"
    assert run_job(job).status == "skipped"


def test_paths_are_relative_to_the_manifest(folder, monkeypatch):
    (folder / "below").mkdir()
    recipe = {"method": "sum", "weights": {"../A": 0.5}, "extras": "../A"}
    make_adapter(folder / "pissa", 3, seed=7, init_lora_weights="pissa")
    sets = {"x": {"models": ["../A", "../pissa"], "initial": {"../pissa": "../C"}, "base": "../base"}}
    write(folder / "below", sets, {"x": recipe})
    make_adapter(folder / "C", 3, seed=6, init_lora_weights="pissa")
    monkeypatch.chdir(folder)
    (job,) = jobs_of("below/m.yaml", "OUT")
    assert job.sources == ("below/../A", "below/../pissa") and job.base == "below/../base"
    assert job.initial == {"below/../pissa": "below/../C"}
    assert run_job(job).status == "done"
    record = json.loads((folder / "OUT/x/x/coremerge.json").read_text())
    assert record["recipe"]["weights"] == {"A": 0.5} and record["recipe"]["extras"] == "A"


def test_a_hub_id_stays_one_unless_it_is_there(folder, monkeypatch):
    make_adapter(folder / "org" / "here")
    monkeypatch.chdir(folder.parent)
    sets = {"x": ["org/name@v1:sub", "org/here", str(folder / "A"), "~/A"]}
    (job,) = jobs_of(write(folder, sets, {"x": {}}), "OUT")
    assert job.sources == ("org/name@v1:sub", str(folder / "org/here"), str(folder / "A"), "~/A")


def test_a_result_never_takes_the_place_of_an_input(folder):
    before = files(folder / "C")
    manifest = write(folder, jobs=[{"set": "pair", "name": "C"}, {"set": "all"}])
    with pytest.raises(OutputError, match=r"C: .*holds an input"):
        run_batch(manifest, folder, overwrite=True)
    assert files(folder / "C") == before


def test_a_folder_of_something_else_is_not_replaced(manifest, folder):
    (folder / "OUT" / "pair" / "ties").mkdir(parents=True)
    (folder / "OUT" / "pair" / "ties" / "thesis.txt").write_text("mine")
    assert "exists and is not empty" in run(manifest, only=["pair/ties"]).failed[0].error
    assert "holds no weights" in run(manifest, only=["pair/ties"], overwrite=True).failed[0].error


def test_a_manifest_of_ones_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    manifest = Manifest.model_validate({"sets": {"pair": ["A", "B"]}})
    assert statuses(run_batch(manifest, "OUT")) == {"pair/default": "done"}


def test_notes_of_jobs_are_in_their_rows(folder):
    make_adapter(folder / "C", layers=1)
    (row,) = run(write(folder, {"x": ["A", "C"]}, {"x": {}})).rows
    assert row.notes == ("C lacks 2 of 4 modules: it contributes nothing there",)


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_was_made_of_a_recipe_is_said_too(folder, dry_run):
    recipe = {"merge_method": "linear", "parameters": {"int8_mask": True}}
    (row,) = run(write(folder, {"x": ["A", "B"]}, {"x": recipe}), dry_run=dry_run).rows
    assert [note.partition(" ")[0] for note in row.notes] == ["int8_mask", "linear"]


def test_a_manifest_that_cannot_be_used_stops_before_any_work(folder):
    with pytest.raises(CoremergeError, match=r"recipes\.default"):
        run(write(folder, recipes={"ties": TIES, "default": {"rank": 0}}))
    assert not (folder / "OUT").exists()


def test_a_set_may_rename_and_a_changed_renaming_is_another_merge(folder):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "B/adapter_model.safetensors")
    moved = {key.replace("model.layers", "net.layers"): value for key, value in held.items()}
    save_file(moved, folder / "B/adapter_model.safetensors")
    models = ["A", "B"]
    written = write(folder, {"x": {"models": models, "rename": {"net": "model"}}}, {"default": {}})
    assert statuses(run(written)) == {"x/default": "done"}
    assert all(name.startswith("model.layers") for name in load(folder / "OUT/x/default"))
    assert statuses(run(written)) == {"x/default": "skipped"}
    other = write(folder, {"x": {"models": models, "rename": {"model": "net"}}}, {"default": {}})
    (row,) = run(other).rows
    assert row.status == "failed" and "rename was" in row.error


def test_another_spelling_of_a_value_is_the_same_recipe(folder):
    flat = {"merge_method": "tsv", "parameters": {"rank": "2.0", "pad": "no"}, "steps": ["isotropize:span=off"]}
    assert statuses(run(write(folder, {"pair": ["A", "B"]}, {"x": flat}))) == {"pair/x": "done"}
    plain = {"merge_method": "tsv", "parameters": {"rank": 2, "pad": False}, "steps": ["isotropize:span=false"]}
    assert statuses(run(write(folder, {"pair": ["A", "B"]}, {"x": plain}))) == {"pair/x": "skipped"}
    assert statuses(run(write(folder, {"pair": ["A", "B"]}, {"x": flat}))) == {"pair/x": "skipped"}
