"""coremerge learn-weights, and merge with learned weights, from files to a file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

import coremerge
from coremerge.learning import read_weights
from coremerge.learning.files import loader
from families import WORDS, make_adapter, make_model

TEXTS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w4")
DATA = ["--data", "A=a.jsonl", "--data", "B=b.txt"]


@pytest.fixture
def learn(run):
    """Runs the command in a folder with a tiny BERT, two adapters of it and inputs for both."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model("bert").bert.save_pretrained("base")
    inner = Tokenizer(models.WordLevel({"[PAD]": 0} | {f"w{i}": i for i in range(1, WORDS)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[PAD]").save_pretrained("base")
    for seed, name in enumerate("AB"):
        make_adapter("bert", Path(name), seed)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text, "label": None}) + "\n" for text in TEXTS))
    Path("b.txt").write_text("\n".join(TEXTS))

    def learn(*words):
        return run("learn-weights", "A", "B", "--base", "base", *words)

    return learn


def test_from_files_to_a_file_to_a_merge(learn, run):
    result = learn(*DATA, "-o", "w.safetensors", "--steps", "3")
    assert result.exit_code == 0, result.stderr
    assert "adapter  mean weight" in result.stdout and "w.safetensors" in result.stdout
    weights = read_weights("w.safetensors")
    assert list(weights) == ["A", "B"] and weights.steps == 3 and weights.settings["objective"] == "match"
    assert (
        run("merge", "A", "B", "-o", "OUT", "--method", "sum", "--scale", "1", "--weights", "w.safetensors").exit_code
        == 0
    )
    merged, a, b = (coremerge.load(name) for name in ("OUT", "A", "B"))
    name = next(iter(merged))
    expected = weights["A"][name] * a[name].dense() + weights["B"][name] * b[name].dense()
    assert float((merged[name].dense() - expected).abs().max()) < 1e-5


def test_the_merge_keeps_its_weights(learn, run):
    assert learn(*DATA, "-o", "w.safetensors", "--steps", "2", "--per", "component").exit_code == 0
    assert run("merge", "A", "B", "-o", "ONE", "--weights", "w.safetensors").exit_code == 0
    assert "merge\\_weights.json has them all" in Path("ONE/README.md").read_text()
    assert run("merge", "A", "B", "-o", "TWO", "--weights", "ONE/merge_weights.json").exit_code == 0
    one, two = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("ONE", "TWO"))
    assert one == two


def test_in_one_go(learn, run):
    words = ["merge", "A", "B", "--method", "sum", "--scale", "1", "--base", "base", *DATA]
    assert run(*words, "-o", "OUT", "--weights", "match", "--json").exit_code == 0
    assert Path("OUT/merge_weights.json").exists()
    planned = run(*words, "-o", "PLAN", "--weights", "nsc", "--dry-run")
    assert planned.exit_code == 0 and "learned weights are for" not in planned.stderr
    assert not Path("PLAN").exists()


def test_what_they_are_for_is_said(learn, run):
    said = "note: learned weights are for --method sum --scale 1"
    learn(*DATA, "-o", "w.safetensors", "--steps", "1")
    words = ["merge", "A", "B", "--weights", "w.safetensors"]
    assert said in run(*words, "-o", "OUT").stderr
    assert said not in run(*words, "-o", "OTHER", "--method", "ties").stderr
    assert not run(*words, "-o", "QUIET", "-q").stderr


@pytest.mark.parametrize("words", [["--weights", "match"], ["--weights", "nsc", "--base", "base"], [*DATA]])
def test_in_one_go_needs_a_base_and_inputs(learn, run, words):
    result = run("merge", "A", "B", "-o", "OUT", *words)
    assert result.exit_code == 2 and "--base and --data" in result.stderr


def test_weights_are_held(learn):
    held = ["--steps", "3", "--rate", "0.5", "--bounds", "0.9,1.1", "--fixed-total"]
    assert learn(*DATA, "-o", "w.safetensors", *held).exit_code == 0
    weights = read_weights("w.safetensors")
    assert weights.settings["bounds"] == [0.9, 1.1] and weights.settings["fixed_total"] is True
    assert 0.9 - 1e-6 <= weights.flat().min() < weights.flat().max() <= 1.1 + 1e-6


def test_adapters_may_be_called_as_they_were_given(learn, run):
    words = ["--data", "./A=a.jsonl", "--preference", "./A=2", "-o", "w.safetensors", "--steps", "1"]
    result = run("learn-weights", "./A", "B", "--base", "base", *words)
    assert result.exit_code == 0, result.stderr
    assert read_weights("w.safetensors").tasks == ("A",)


def test_the_base_runs_in_what_is_asked_for_under_either_name(learn, monkeypatch):
    asked = []

    def noted(base, dtype="auto", device="cpu"):
        asked.append(dtype)
        return loader(base, dtype, device)

    monkeypatch.setattr("coremerge.learning.files.loader", noted)
    for words in ((), ("--base-dtype", "bfloat16"), ("--dtype", "bfloat16")):
        learn(*DATA, "-o", "w.safetensors", "--steps", "1", "--overwrite", *words)
    assert asked == ["auto", "bfloat16", "bfloat16"]


def test_json(learn):
    result = learn(*DATA, "-o", "w.safetensors", "--steps", "2", "--json", "--objective", "nsc", "--preference", "A=2")
    told = json.loads(result.stdout)
    assert set(told["weights"]) == {"A", "B"} and len(told["objective"]) == 2
    assert told["settings"]["rate"] == 3e-4


def test_quiet(learn):
    result = learn(*DATA, "-o", "w.safetensors", "--steps", "1", "-q", "--autocast", "--checkpointing")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_an_adapter_without_inputs(learn):
    result = learn(*DATA[:2], "-o", "w.safetensors", "--steps", "1")
    assert result.exit_code == 0 and "no inputs" in result.stdout


def test_ctrl_c_keeps_what_was_learned_and_resume_goes_on(learn, monkeypatch):
    from coremerge.learning import weights as module

    step = module._Descent._step

    def interrupted(self, slopes):
        step(self, slopes)
        if len(self.history) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert learn(*DATA, "-o", "whole.safetensors", "--steps", "5").exit_code == 0
    monkeypatch.setattr(module._Descent, "_step", interrupted)
    result = learn(*DATA, "-o", "half.safetensors", "--steps", "5")
    assert result.exit_code == 0 and "2 of 5" in result.stdout
    monkeypatch.setattr(module._Descent, "_step", step)
    assert learn(*DATA, "-o", "rest.safetensors", "--steps", "5", "--resume", "half.safetensors").exit_code == 0
    assert read_weights("rest.safetensors").table == read_weights("whole.safetensors").table


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([*DATA, "-o", "w.json"], 1, "written as .safetensors"),
        ([*DATA, "-o", "A/adapter_model.safetensors"], 1, "exists"),
        (["--data", "C=a.jsonl", "-o", "w.safetensors"], 1, 'data = "C": no adapter of that name'),
        (["--data", "A=nothing.jsonl", "-o", "w.safetensors"], 1, "nothing.jsonl"),
        (["--data", "A", "-o", "w.safetensors"], 1, "no images in this folder"),
        ([*DATA, "-o", "w.safetensors", "--per", "layer"], 2, "none of adapter, module, component"),
        ([*DATA, "-o", "w.safetensors", "--preference", "A=x"], 2, "'x' is not a number"),
        ([*DATA, "-o", "w.safetensors", "--bounds", "1"], 2, "'1' is not LOW,HIGH"),
        ([*DATA, "-o", "w.safetensors", "--bounds", "2,x"], 2, "'2,x' is not LOW,HIGH"),
        ([*DATA, "-o", "w.safetensors", "--objective", "best"], 1, "no such objective"),
        ([*DATA, "-o", "w.safetensors", "--base", "nowhere"], 1, "nowhere"),
    ],
)
def test_refusals(learn, words, status, message):
    before = sorted(Path().rglob("*"))
    result = learn(*words)
    assert result.exit_code == status
    assert message in " ".join(result.stderr.split())
    assert sorted(Path().rglob("*")) == before


def test_the_file_says_what_it_is(learn):
    assert learn(*DATA, "-o", "w.safetensors", "--steps", "1").exit_code == 0
    with safe_open("w.safetensors", "pt") as file:
        assert file.metadata()["format"] == "coremerge.weights.1"
