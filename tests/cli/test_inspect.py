"""coremerge inspect."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tiny import make_adapter


def test_one_adapter(run):
    result = run("inspect", "A")
    assert (result.exit_code, result.stderr) == (0, "")
    first = result.stdout.splitlines()[2].split()
    assert first == ["A", "LORA", "4", "4", "2", "float32", "2.69", "kB", "org/tiny"]
    row = next(line for line in result.stdout.splitlines() if "[0-1].self_attn.q_proj" in line)
    assert row.split()[1:] == ["2", "24", "x", "24", "linear", "4", "2", "float32"]


def test_several_adapters_are_compared(run):
    result = run("inspect", "A", "B", "C", "--threads", "1")
    assert result.exit_code == 0
    assert "cosine" in result.stdout
    assert "share of norm in the span of" in result.stdout
    assert "warning: C lacks 3 of 4 modules" in result.stderr
    assert run("inspect", "A", "B", "C", "-q").stderr == ""


def test_an_adapter_of_zeros_is_told(run):
    make_adapter(Path("N"), lora_alpha=0)
    assert "warning: N is zero in all of its modules: it adds nothing to a merge" in run("inspect", "A", "N").stderr


def test_a_merge_that_would_be_refused_is_told(run):
    for i in (1, 2):
        make_adapter(Path(f"H{i}"), seed=i, extra={"score.weight": i * torch.ones(2, 24)}, modules_to_save=["score"])
    result = run("inspect", "H1", "H2")
    assert result.exit_code == 0
    assert "a merge would be refused: score.weight" in result.stderr
    assert result.stdout.count("model.layers.[0-1].self_attn.q_proj") == 2
    found = json.loads(run("inspect", "H1", "H2", "--json").stdout)
    assert found["merge"]["plan"] is None
    assert "score.weight" in found["merge"]["refused"]
    assert found["adapters"][0]["whole_tensors"] == ["score.weight"]


def test_whole_tensors_are_listed(run):
    make_adapter(Path("H"), extra={"score.weight": torch.ones(2, 24)}, modules_to_save=["score"])
    assert "carried over from H" in run("inspect", "H").stdout


def test_adapters_without_a_common_module_are_shown_all_the_same(run):
    make_adapter(Path("K"), parts=("k_proj",))
    result = run("inspect", "A", "K")
    assert result.exit_code == 0
    assert "a merge would be refused: the adapters have no module in common" in result.stderr


def test_notes_are_told(run):
    make_adapter(Path("P"), seed=8, init_lora_weights="pissa")
    make_adapter(Path("P0"), seed=9, init_lora_weights="pissa")
    assert "note: P: converted from its initial adapter" in run("inspect", "P", "--initial", "P=P0").stderr


def test_what_a_merge_keeps(run):
    run("merge", "A", "B", "-o", "M", "--method", "sum", "--scale", "1", "-q")
    result = run("inspect", "A", "B", "--merged", "M")
    row = next(line for line in result.stdout.splitlines() if line.startswith("A") and "1.000" in line)
    assert row.split()[1] == "1.000"
    found = json.loads(run("inspect", "A", "B", "--merged", "M", "--json").stdout)
    assert abs(found["kept"]["A"]["energy"] - 1) < 1e-6


def test_json(run):
    found = json.loads(run("inspect", "A", "B", "--json").stdout)
    module = found["adapters"][0]["modules"]["model.layers.0.self_attn.v_proj"]
    assert module == {"shape": [12, 24], "kind": "linear", "rank": 4, "scale": 2.0, "dtype": "float32", "bytes": 576}
    pair = found["alignment"]["pairs"][0]
    assert (pair["from"], pair["to"], pair["shared_modules"]) == ("A", "B", 4)
    assert -1 <= pair["cosine"] <= 1 and 0 <= pair["subspace_alignment_ratio"] <= 1
    assert found["merge"]["plan"]["rank"] == 10
    assert json.loads(run("inspect", "A", "--json").stdout)["alignment"] is None


def test_an_unreadable_adapter_is_refused(run):
    result = run("inspect", "A", "nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "nowhere" in result.stderr


def test_nothing_to_inspect(run):
    assert run("inspect").exit_code == 2


def test_names_of_modules_cannot_command_the_terminal(run):
    make_adapter(Path("A"), parts=("\x1b[2Jq\u202e",), base_model_name_or_path="\x9b2J[/]")
    make_adapter(Path("B\r\x1b[A"), parts=("\x1b]0;x\x07v",))
    for words in (("A",), ("A", "B\r\x1b[A"), ("A", "B\r\x1b[A", "--json")):
        result = run("inspect", *words)
        assert result.exit_code == 0
        assert all(line == "" or line.isprintable() for line in (result.stdout + result.stderr).split("\n"))
    assert r"\x1b[2Jq\u202e" in run("inspect", "A").stdout
