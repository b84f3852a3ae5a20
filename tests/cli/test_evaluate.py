"""coremerge evaluate and search, on the task set that the evaluation's tests make."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import coremerge
from coremerge.cli import demo
from coremerge.cli.evaluate import render
from coremerge.demo import DemoResult, Row
from coremerge.evaluation.evaluate import Evaluated, Evaluation
from coremerge.evaluation.scoring import Scores
from coremerge.evaluation.taskset import Task

NASTY = "\x1b[31m[/][bold]x"


@pytest.fixture
def run(run):
    return lambda *words: run(*map(str, words))


@pytest.fixture(scope="module")
def taskset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = Path(__file__).parents[1] / "evaluation" / "conftest.py"
    spec = importlib.util.spec_from_file_location("taskset_made", file)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder: Path = made.make_taskset(tmp_path_factory.mktemp("taskset"))
    return folder


def test_evaluate_prints_shares_and_scores(run, taskset):
    result = run("evaluate", "--tasks", taskset, taskset / "colour")
    assert result.exit_code == 0
    for words in ("tiny, test rows", "each task's own adapter", "no adapter", "± 95 %", "accuracy, 12", "pearson, 12"):
        assert words in result.stdout
    own = next(line for line in result.stdout.splitlines() if line.startswith("each task's own adapter"))
    assert own.split("adapter")[1].split() == ["1.000", "1.000", "colour"]  # by definition: no margin
    assert result.stderr == ""


def test_evaluate_json_is_also_written_to_a_file(run, taskset, tmp_path):
    out = tmp_path / "made" / "scores.json"
    result = run("evaluate", "--tasks", taskset, taskset / "colour", "--json", "-o", out, "--limit", "6")
    data = json.loads(result.stdout)
    assert json.loads(out.read_text()) == data
    assert data["tasks"]["colour"] == {"kind": "classification", "metric": "accuracy", "rows": 6}
    assert [row["label"] for row in data["rows"]] == ["each task's own adapter", "no adapter", "colour"]
    again = run("evaluate", "--tasks", taskset, taskset / "colour", "-o", out)
    assert (again.exit_code, "--overwrite" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "nowhere"),
        (["--split", "train"], 2, "none of test, validation"),
        (["--only", "size"], 1, "no such task"),
    ],
)
def test_evaluate_refuses_in_one_line(run, taskset, arguments, status, message):
    result = run("evaluate", "--tasks", taskset, *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_search_writes_a_recipe_that_merge_takes(run, taskset, tmp_path):
    plan, out = tmp_path / "plan.yaml", tmp_path / "best.yaml"
    merges = [{"merge_method": "sum"}, {"merge_method": "ties", "parameters": {"density": [0.5, 1.0]}}]
    plan.write_text(yaml.safe_dump({"merges": merges}))
    result = run("search", "--tasks", taskset, "--plan", plan, "-o", out, "--budget", "3")
    assert result.exit_code == 0
    for words in ("no adapter", "core sum", "core ties", "winner", f"coremerge merge --recipe {out} -o OUT"):
        assert words in result.stdout
    assert "note: core ties: the budget of 3 scores ended its search" in result.stderr
    assert run("merge", "--recipe", out, "-o", tmp_path / "merged", "-q").exit_code == 0
    assert len(coremerge.load(tmp_path / "merged")) == 4
    again = run("search", "--tasks", taskset, "--plan", plan, "-o", out)
    assert (again.exit_code, "--overwrite" in again.stderr) == (1, True)


def test_search_tunes_for_a_joint_group_and_says_so(run, taskset, tmp_path):
    data = yaml.safe_load((taskset / "tasks.yaml").read_text()) | {"joint": {"all of it": ["colour"]}}
    data["base"] = {"path": str(taskset / "base")}
    for task in data["tasks"].values():
        task |= {key: str(taskset / task[key]) for key in ("adapter", "head", "validation", "test")}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(data))
    plan, out = tmp_path / "plan.yaml", tmp_path / "r.yaml"
    plan.write_text("{merges: [{merge_method: sum}], scales: {values: [0.5, 1.0]}}")
    words = ("search", "--tasks", tmp_path, "--plan", plan, "-o", out, "--target")
    assert 'target = "none"' in run(*words, "none").stderr and not out.exists()
    result = run(*words, "all of it")
    assert result.exit_code == 0
    assert "all of it: accuracy, task unknown" in result.stdout
    data = json.loads(run(*words, "all of it", "--overwrite", "--json").stdout)
    assert data["target"] == "all of it"
    assert data["rows"][0]["validation"] == max(one["score"] for one in data["rows"][0]["tried"])


def test_search_prints_all_that_was_tried_as_json(run, taskset, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("{merges: [{merge_method: sum}], scales: {values: [0.5, 1.0]}}")
    data = json.loads(run("search", "--tasks", taskset, "--plan", plan, "-o", tmp_path / "r.yaml", "--json").stdout)
    assert [one["scale"] for one in data["rows"][0]["tried"]] == [0.5, 1.0]
    assert data["winner"] == "core sum"


def test_log_likelihoods_of_answers_are_a_table_of_their_own():
    task = Task(kind="generation", metric="exact_match", prompt="{text}", test="rows.jsonl")
    rows = [Evaluated(name, Scores({"t": 0.0}, {}, log_likelihood={"t": x})) for name, x in (("a", -4.3), ("b", -31.0))]
    shown = render(Evaluation("name", "test", "base", {"t": task}, {"t": 3}, tuple(rows)))
    lines = shown.split("Log-likelihood of the right answer:\n")[1].split("\n")
    assert (lines[0].split(), lines[-1].split()) == (["task", "a", "b"], ["t", "-4.30", "-31.00"])


def test_names_of_tasks_cannot_command_the_terminal():
    scores = Scores({NASTY: 0.5}, {NASTY: 0.5}, {NASTY: 0.5}, {NASTY: (0.4, 0.6)})
    task = Task(kind="lm-eval", metric=NASTY, harness=NASTY)
    result = Evaluation(NASTY, "test", NASTY, {NASTY: task}, {NASTY: None}, (Evaluated(NASTY, scores),))
    assert all(line == "" or line.isprintable() for line in render(result).split("\n"))


@pytest.mark.parametrize(("count", "turned"), [(2, False), (9, True)])
def test_more_tasks_than_merges_are_a_line_each_in_the_demo(capsys, count, turned):
    scores = Scores({f"t{i}": i / 10 for i in range(count)}, {f"t{i}": i / 10 for i in range(count)})
    rows = tuple(Row(label, scores) for label in ("own adapter", "a merge"))
    for part in demo.render(DemoResult("name", rows, 1.0, None)):
        Console(width=400).print(part)
    said = capsys.readouterr().out
    assert ("┃ task " in said) == turned and "tuned" not in said
    assert f"t{count - 1}" in said and f"{(count - 1) / 10:.3f}" in said


def test_names_of_tasks_are_only_text_to_the_demo(capsys):
    rows = tuple(Row(label, Scores({NASTY: 0.5}, {NASTY: 0.5})) for label in ("own adapter", "no adapter"))
    for part in demo.render(DemoResult(NASTY, rows, 1.0, None)):
        Console(width=400).print(part)
    said = capsys.readouterr().out
    assert NASTY.replace("\x1b", r"\x1b") in said and "\x1b" not in said
