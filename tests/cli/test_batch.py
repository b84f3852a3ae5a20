"""coremerge batch."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from coremerge.cli import _options
from posted import Posted
from tiny import make_adapter

MANIFEST = """
recipes:
  default: {}
  ties: {merge_method: ties, parameters: {density: 0.2}}
sets:
  pair: [A, B]
  all: [A, B, C]
"""


@pytest.fixture
def batch(run):
    """Runs ``coremerge batch m.yaml -o OUT`` with further words."""
    Path("m.yaml").write_text(MANIFEST)
    return lambda *words: run("batch", "m.yaml", "-o", "OUT", *words)


def rows(result):
    """Job → what became of it, of the printed table."""
    return dict(re.findall(r"^(\S+/\S+) +(done|skipped|failed|planned) ", result.stdout, re.MULTILINE))


def test_a_table_says_what_was_done(batch):
    result = batch()
    assert result.exit_code == 0
    assert rows(result) == dict.fromkeys(["pair/default", "pair/ties", "all/default", "all/ties"], "done")
    assert re.search(r"^done    4\ntime    .* s\noutput  OUT\n\Z", result.stdout, re.MULTILINE)
    assert result.stderr == "note: all/default, all/ties: C lacks 3 of 4 modules: it contributes nothing there\n"
    assert set(rows(batch("--threads", "1")).values()) == {"skipped"}


def test_the_files_are_those_of_merge_but_for_the_command(batch, run):
    batch("-q", "--only", "all/ties")
    run("merge", "A", "B", "C", "-o", "alone", "--method", "ties", "-p", "density=0.2", "-q")
    ours, theirs = Path("OUT/all/ties"), Path("alone")
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    said = [json.loads((folder / "coremerge.json").read_text()) for folder in (ours, theirs)]
    assert said[0].pop("command") == ["coremerge", "batch", "m.yaml", "-o", "OUT", "--only", "all/ties"]
    assert said[1].pop("command") and said[0] == said[1]
    assert "coremerge batch m.yaml -o OUT --only all/ties" in (ours / "README.md").read_text()


def test_failures_are_in_the_table_and_in_the_exit_status(batch):
    Path("m.yaml").write_text(MANIFEST + "  gone: [A, nowhere]\n")
    result = batch("--only", "*/ties")
    assert result.exit_code == 1
    assert rows(result) == {"pair/ties": "done", "all/ties": "done", "gone/ties": "failed"}
    assert re.search(r"^gone/ties  nowhere: no such file or folder", result.stdout, re.MULTILINE)
    assert result.stderr.endswith("Error: 1 of 3 jobs failed\n")


def test_quiet_leaves_the_errors(batch):
    words = ("-q", "--only", "all/*")
    assert batch(*words).output == ""
    make_adapter(Path("C"), 3, seed=9)
    result = batch(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line[:19] for line in result.stderr.splitlines()] == ["Error: all/default:", "Error: all/ties: OU"]
    assert batch(*words, "--overwrite").output == "" == batch(*words).output


def test_a_dry_run_writes_nothing(batch):
    result = batch("--dry-run")
    assert set(rows(result).values()) == {"planned"} and "not written: dry run" in result.stdout
    assert not Path("OUT").exists()


def test_json_for_programs(batch):
    result = batch("--only", "pair/*", "--json")
    said = json.loads(result.stdout)
    assert (said["out"], said["counts"]) == ("OUT", {"done": 2})
    assert [(row["name"], row["status"], row["error"]) for row in said["jobs"]] == [
        ("pair/default", "done", None),
        ("pair/ties", "done", None),
    ]


def test_options_that_change_the_result_are_in_the_command(batch):
    batch("--only", "pair/ties", "--allow-pickle", "--device", "cpu:0", "-q")
    said = json.loads(Path("OUT/pair/ties/coremerge.json").read_text())["command"]
    assert said[5:] == ["--allow-pickle", "--device", "cpu:0", "--only", "pair/ties"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sets: {../x: [A]}", 'm.yaml: sets = "../x": a name becomes a folder'),
        ("sets: {x: [A]}\nrecipes: {y: {rank: 0}}", "m.yaml: recipes.y: rank = 0"),
        ("sets: [", "m.yaml: not YAML"),
    ],
)
def test_a_wrong_manifest_is_one_message(batch, text, said):
    Path("m.yaml").write_text(text)
    result = batch()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {said}") and result.stderr.count("\n") == 1
    assert not Path("OUT").exists()


def test_ctrl_c_ends_it_and_the_same_command_goes_on(batch, monkeypatch):
    from coremerge import pipeline

    execute = pipeline.execute

    def stop(plan, **how):
        if len(plan.adapters) == 3:
            raise KeyboardInterrupt
        return execute(plan, **how)

    monkeypatch.setattr(pipeline, "execute", stop)
    result = batch()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "note: finished results stay in OUT: the same command goes on from there\n"
    assert sorted(path.name for path in Path("OUT").iterdir()) == ["pair"]
    monkeypatch.setattr(pipeline, "execute", execute)
    assert [*rows(batch()).values()] == ["skipped", "skipped", "done", "done"]


def test_a_cluster_is_for_the_work_alone(batch, monkeypatch):
    asked = []

    @contextmanager
    def cluster(address, *_):
        asked.append(address)
        yield Posted()

    monkeypatch.setattr(_options, "_cluster", cluster)
    assert set(rows(batch("--executor", "ray", "--dry-run")).values()) == {"planned"} and not asked
    assert set(rows(batch("--executor", "ray", "--address", "auto")).values()) == {"done"}
    assert asked == ["auto"]
    said = json.loads(Path("OUT/pair/ties/coremerge.json").read_text())["command"]
    assert said == ["coremerge", "batch", "m.yaml", "-o", "OUT", "--only", "pair/ties"]
    assert set(rows(batch()).values()) == {"skipped"}


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--executor", "slurm"), "neither 'local' nor 'ray'"), (("--address", "auto"), "goes with --executor ray")],
)
def test_who_does_the_work_is_one_of_two(batch, words, said):
    result = batch(*words)
    assert result.exit_code == 2 and said in result.stderr and not Path("OUT").exists()
