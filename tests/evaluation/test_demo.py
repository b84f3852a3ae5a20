from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from coremerge import Recipe
from coremerge.bases import CONVERTERS
from coremerge.cli import demo as command
from coremerge.demo import CANDIDATES, FITTED, run_demo
from coremerge.errors import SourceError
from coremerge.evaluation import read_taskset
from families import make_adapter
from speakers import make_speaker, rows_for, write_rows

TWO = {"sum": Recipe(method="sum", steps=[], scale=0.5), "tsv": CANDIDATES["core TSV"]}


def test_rows_are_own_none_and_one_per_candidate(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    result = run_demo(folder, candidates=TWO, progress=lambda *call: calls.append(call))
    labels = ["own adapter", "no adapter", "sum", "tsv", FITTED]
    assert [row.label for row in result.rows] == labels
    assert calls == [(label, i, 5) for i, label in enumerate([*labels, "done"])]
    assert result["own adapter"].scores.mean == 1.0
    assert result["sum"].scale == 0.5
    assert result["tsv"].seconds is not None
    json.dumps(result.to_dict())


def test_a_tuned_scale_of_one_factor_is_the_default(folder: Path) -> None:
    result = run_demo(folder, candidates=TWO, full=True)
    assert result[FITTED].tuned is None
    for row in result.rows[2:-1]:
        assert row.tuned is not None
        assert (row.tuned_scale == row.scale) == (row.tuned is row.scores)


def test_without_validation_rows_no_scale_is_tuned(folder: Path) -> None:
    result = run_demo(folder, candidates=TWO, rows={"test": 3})
    assert result.used == {"test": 3}
    assert [row.tuned for row in result.rows] == [None] * 5


def test_a_quick_look_may_leave_tasks_out(folder: Path) -> None:
    result = run_demo(folder, candidates=TWO, tasks=["colour"])
    assert result.left_out == 1 and set(result["sum"].scores.raw) == {"colour"}
    assert "1 of 2 adapters are merged" in str(command.render(result)[-1])
    whole = run_demo(folder, candidates=TWO, tasks=["colour"], full=True)
    assert whole.left_out == 0 and set(whole["sum"].scores.raw) == {"colour", "length"}


def speaking(folder: Path) -> Path:
    """A task set of a language model: text that it makes, and the likeliest of some answers."""
    make_speaker("llama", folder / "base")
    tasks: dict[str, dict[str, object]] = {}
    for seed, name in enumerate(("say", "choose")):
        make_adapter("llama", folder / name, seed)
        rows = [row | {"answer": "w3", "label": "w3"} for row in rows_for("llama", folder)]
        write_rows(folder / f"{name}.jsonl", rows)
        files = {"adapter": name, "validation": f"{name}.jsonl", "test": f"{name}.jsonl"}
        tasks[name] = {"prompt": "w9 {words}", "chat": True, **files}
    tasks["say"] |= {"kind": "generation", "metric": "rouge_l", "max_new_tokens": 4}
    tasks["choose"] |= {"kind": "choice", "metric": "accuracy", "choices": ["w3", "w4"]}
    (folder / "tasks.yaml").write_text(json.dumps({"name": "spoken", "base": {"path": "base"}, "tasks": tasks}))
    return folder


def test_a_world_without_heads_gives_the_same_rows(tmp_path: Path) -> None:
    result = run_demo(speaking(tmp_path), candidates=TWO, rows={"test": 4})
    assert [row.label for row in result.rows] == ["own adapter", "no adapter", *TWO, FITTED]
    assert set(result[FITTED].scores.raw) == {"say", "choose"}


def run(*arguments: str) -> str:
    app = Typer()
    app.command()(command.demo)
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_prints_both_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_example", lambda name: folder)
    text = run("-q")
    for label in ("own adapter", "no adapter", *CANDIDATES, "score", "colour", "length", "A quick look"):
        assert label in text
    assert "A quick look" not in run("-q", "--full")


def test_the_command_prints_json(folder: Path) -> None:
    rows = json.loads(run(str(folder), "--json"))["rows"]
    assert [row["label"] for row in rows[2:]] == [*CANDIDATES, FITTED]
    assert rows[0]["scores"]["mean"] == 1.0


def test_a_folder_is_looked_at_by_what_its_tasks_are(folder: Path, tmp_path: Path) -> None:
    assert command.look_at(folder).candidates == ()
    assert command.look_at(speaking(tmp_path)).candidates == command.FEW
    for shown in command.WORLDS.values():
        assert command.look_at(command.find_example(shown.folder)) == shown


@pytest.mark.parametrize("world", list(command.World))
def test_a_world_is_looked_at_in_the_time_that_there_is(
    world: command.World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def found(name: str) -> Path:
        asked.append(name)
        return folder

    monkeypatch.setattr(command, "find_example", found)
    shown = replace(command.WORLDS[world], tasks=())  # of the shipped example
    monkeypatch.setattr(command, "WORLDS", {**command.WORLDS, world: shown})
    data = json.loads(run("--world", world.value, "--json", "-q"))
    assert asked == [shown.folder]
    assert [row["label"] for row in data["rows"][2:-1]] == list(shown.candidates or CANDIDATES)
    assert set(shown.candidates) <= set(CANDIDATES)


@pytest.mark.parametrize("world", [world for world, shown in command.WORLDS.items() if shown.tasks])
def test_tasks_of_a_quick_look_are_there(world: command.World) -> None:
    shown = command.WORLDS[world]
    assert set(shown.tasks) <= set(read_taskset(command.find_example(shown.folder)).tasks)


def test_an_example_without_adapters_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples" / "vlm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no adapters are trained there yet"):
        command.find_example("vlm")


def test_make_installs_what_the_worlds_are_made_of() -> None:
    text = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    lines = dict(line.split(" := ") for line in text.splitlines() if line.startswith("CARRIERS_"))
    assert lines["CARRIERS_vision"] == CONVERTERS["dinov2"].requirement
    assert lines["CARRIERS_generation"] == CONVERTERS["smollm2"].requirement
    assert {key.removeprefix("CARRIERS_") for key in lines} <= {world.value for world in command.World}


def test_the_example_is_found_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples" / "one" / "adapters").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert command.find_example("one") == tmp_path / "examples" / "one"


def test_without_the_example_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "__file__", str(tmp_path / "a" / "b" / "c" / "demo.py"))
    with pytest.raises(SourceError, match="clone"):
        command.find_example("one")


def test_nothing_heavy_is_imported_with_the_command() -> None:
    code = "import sys, coremerge.cli.demo; print({'torch', 'transformers', 'rich.table'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
