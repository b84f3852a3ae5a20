"""coremerge fit, from files to a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import coremerge
from families import WORDS, make_adapter, make_model
from speakers import make_speaker

TEXTS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w4")
DATA = ["--data", "A=a.jsonl", "--data", "B=b.txt"]


@pytest.fixture
def fit(run):
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

    def fit(*words):
        return run("fit", "A", "B", "--base", "base", *words)

    return fit


def test_from_files_to_a_folder(fit, run):
    result = fit(*DATA, "-o", "OUT", "--rank", "4", "--report")
    assert result.exit_code == 0, result.stderr
    for said in ("fitted to 8 inputs of 2 tasks; prior: iso, ridge 0.1", "held-out error", "OUT", "in memory"):
        assert said in result.stdout
    merged = coremerge.load("OUT")
    assert {module.rank for module in merged.modules.values()} == {4}
    card = Path("OUT/README.md").read_text()
    assert "fitted to 8 inputs" in card and "## Recipe" not in card and "coremerge fit" in card
    assert "fitted to 8 inputs" in Path("OUT/report.html").read_text()
    record = json.loads(Path("OUT/coremerge.json").read_text())
    assert record["made"].startswith("fitted") and set(record["fit"]["modules"]) == set(merged)
    assert run("inspect", "--merged", "OUT", "A", "B").exit_code == 0


def test_the_same_files_again_and_after_a_stop(fit, monkeypatch):
    assert fit(*DATA, "-o", "ONE").exit_code == 0
    from coremerge.learning import fitting

    tell, times = fitting.Fitting._tell, []

    def stop(self, progress):
        times.append(1)
        if len(times) == 3:
            raise KeyboardInterrupt
        tell(self, progress)

    with monkeypatch.context() as patched:
        patched.setattr(fitting.Fitting, "_tell", stop)
        assert fit(*DATA, "-o", "TWO", "--resume", "kept.safetensors").exit_code != 0
    assert not Path("TWO").exists() and Path("kept.safetensors").exists()
    assert fit(*DATA, "-o", "TWO", "--resume", "kept.safetensors").exit_code == 0
    assert Path("ONE/adapter_model.safetensors").read_bytes() == Path("TWO/adapter_model.safetensors").read_bytes()


def test_preferences_by_name(fit):
    for out, words in {"ONE": [], "TWO": ["--preference", "B=3"]}.items():
        assert fit(*DATA, "-o", out, *words).exit_code == 0
    assert Path("ONE/adapter_model.safetensors").read_bytes() != Path("TWO/adapter_model.safetensors").read_bytes()
    assert "no adapter of that name" in fit(*DATA, "-o", "NO", "--preference", "C=3").stderr


def test_each_module_at_its_own_rank(fit):
    assert fit(*DATA, "-o", "OUT", "--rank-budget", "3", "--rank-pattern").exit_code == 0
    ranks = json.loads(Path("OUT/adapter_config.json").read_text())["rank_pattern"]
    held = {name: module.rank for name, module in coremerge.load("OUT").modules.items()}
    assert ranks and held == dict.fromkeys(held, max(held.values())) | ranks and sum(held.values()) == 3 * len(held)
    result = fit(*DATA, "-o", "MODEL", "--rank-pattern", "--into", "base")
    assert result.exit_code == 2 and "--into" in result.stderr


def test_mean_and_largest_rank_are_said(fit):
    result = fit(*DATA, "-o", "OUT", "--rank-budget", "3", "--rank", "4")
    assert result.exit_code == 0 and "4 at most, 3 on average" in result.stdout
    result = fit(*DATA, "-o", "NO", "--rank-budget", "3", "--rank", "2")
    assert result.exit_code == 1 and "no module is to have more than rank 2" in result.stderr


def test_what_a_cut_takes_is_said(fit):
    assert "outputs lost" not in fit(*DATA, "-o", "WHOLE").stdout
    result = fit(*DATA, "-o", "CUT", "--rank", "1")
    assert "by the cut to rank, on average over modules" in result.stdout
    assert "warning: the cut to rank loses" in result.stderr
    said = json.loads(Path("CUT/coremerge.json").read_text())["fit"]
    lost = [module["lost"] for module in said["modules"].values()]
    assert said["outputs_lost"] == pytest.approx(sum(lost) / len(lost)) and min(lost) > 0


def test_errors_that_were_not_measured_are_not_printed(fit, run):
    result = fit(*DATA, "-o", "OUT", "--inputs", "1")
    assert "held-out error" not in result.stdout and "too few inputs to hold some out" in result.stderr
    result = run("fit", "A", "--base", "base", *DATA[:2], "-o", "ONE")
    assert "keep the prior" not in result.stdout + result.stderr
    assert "a single adapter comes back as it is" in result.stderr


def test_json_and_dry_run(fit):
    said = json.loads(fit(*DATA, "-o", "OUT", "--dry-run", "--json").stdout)
    assert said["inputs"] == {"A": 4, "B": 4} and not Path("OUT").exists()
    half = json.loads(fit(*DATA, "-o", "OUT", "--dry-run", "--json", "--base-dtype", "bfloat16").stdout)["states"]
    assert said["states"]["where"] == "memory" and 0.5 < half["bytes"] / said["states"]["bytes"] < 0.8
    assert "not written: dry run" in fit(*DATA, "-o", "OUT", "--dry-run").stdout
    said = json.loads(fit(*DATA, "-o", "OUT", "--json", "--prior", "router", "--ridge", "0.1").stdout)
    assert said["report"]["fit"]["prior"] == "router" and said["output"]["path"] == "OUT"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "C=a.jsonl"], "C"),
        ([*DATA, "--prior", "best"], "--prior"),
        ([*DATA, "--resume", "a.jsonl"], "a.jsonl"),
        (["--data", "A=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_is_refused_leaves_nothing(fit, words, said):
    result = fit(*words, "-o", "OUT")
    assert result.exit_code in (1, 2) and said in result.stderr
    assert not Path("OUT").exists()


def test_one_out_of_many_cores_says_so(fit):
    assert fit(*DATA, "-o", "OUT").exit_code == 0
    result = fit(*DATA, "-o", "OUT")
    assert result.exit_code == 1 and "--overwrite" in result.stderr


def test_a_base_model_with_a_head_is_loaded_in_silence_and_one_with_holes_is_not(fit, tmp_path):
    make_model("bert").save_pretrained("headed")
    for name in ("config.json", "model.safetensors"):
        Path("headed", name).replace(Path("base", name))
    said = fit(*DATA, "-o", "OUT").stderr
    assert "REPORT" not in said and "\x1b" not in said and "random" not in said
    held = load_file("base/model.safetensors")
    save_file({k: v for k, v in held.items() if "layer.3" not in k}, "base/model.safetensors", {"format": "pt"})
    said = fit(*DATA, "-o", "TWO").stderr
    assert "warning: base lacks weights of the model, which are random now: encoder.layer.3." in said.replace(
        f"{tmp_path}/", ""
    )
    assert not fit(*DATA, "-o", "TWO", "-q", "--overwrite").stderr


@pytest.fixture
def tasks(fit):
    """A task set whose tasks are named like the adapters, and one more."""
    Path("set").mkdir()
    lines = ["name: set", "base: {path: ../base}", "tasks:"]
    for name, more in {"A": "unlabelled: ../a.jsonl", "B": "validation: b.jsonl", "C": "validation: b.jsonl"}.items():
        lines += [
            f"  {name}: {{kind: classification, metric: accuracy, classes: [x, y], head: none, test: b.jsonl, {more}}}"
        ]
    Path("set/tasks.yaml").write_text("\n".join(lines))
    rows = [{"text": text, "label": "x"} for text in TEXTS]
    Path("set/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("given", [["set"], ["set/tasks.yaml"], ["A=set", "B=b.txt"], ["set", "B=b.txt"]])
def test_a_task_set_brings_its_tasks_inputs(fit, tasks, given):
    assert fit(*DATA, "-o", "ONE").exit_code == 0
    result = fit(*(word for text in given for word in ("--data", text)), "-o", "TWO")
    assert result.exit_code == 0, result.stderr
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("ONE", "TWO"))
    assert all((one[key] == two[key]).all() for key in one)


def test_inputs_without_a_name_serve_adapters_that_have_none(fit):
    for out, given in {"POOL": ["b.txt"], "NAMED": ["A=b.txt", "B=b.txt"], "MIXED": ["A=a.jsonl", "b.txt"]}.items():
        result = fit(*(word for text in given for word in ("--data", text)), "-o", out)
        assert result.exit_code == 0, result.stderr
    files = [Path(out, "adapter_model.safetensors").read_bytes() for out in ("POOL", "NAMED", "MIXED")]
    assert files[0] == files[1] == files[2]  # a.jsonl and b.txt hold the same texts
    for given, said in {"nowhere.txt": "no such file", "b.txt": "two sources without a name"}.items():
        result = fit("--data", given, *(["--data", "a.jsonl"] if given == "b.txt" else []), "-o", "NO")
        assert result.exit_code == 1 and said in result.stderr and not Path("NO").exists()
    assert "every adapter has inputs of its own" in fit(*DATA, "--data", "b.txt", "-o", "NO").stderr


def test_a_task_set_that_does_not_fit_is_refused(fit, tasks):
    for given, said in {"C=set": "no adapter of that name", "A=": "is not NAME=PATH, nor a task set"}.items():
        assert said in fit("--data", "set", "--data", given, "-o", "OUT").stderr
    shutil.copytree("set", "again")
    assert "two task sets have this task" in fit("--data", "set", "--data", "again", "-o", "OUT").stderr
    file = Path("set/tasks.yaml")
    file.write_text(file.read_text().replace("  A:", "  D:").replace("  B:", "  E:"))
    for given, said in {"set": "no task is named like an adapter", "A=set": "no task of that name"}.items():
        result = fit("--data", given, "-o", "OUT")
        assert result.exit_code == 1 and not Path("OUT").exists()
        assert said in result.stderr and "D, E, C" in result.stderr


@pytest.fixture
def decoders(run):
    """Runs the command with two adapters of a tiny decoder that has a chat template."""
    make_speaker("llama", Path("base"))
    for seed, name in enumerate("AB"):
        make_adapter("llama", Path(name), seed, task_type="CAUSAL_LM")
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    return lambda *words: run("fit", "A", "B", "--base", "base", "--data", "chats.jsonl", *words)


def test_adapters_that_answer_are_fitted_to_their_own_answers(decoders):
    files = {}
    for out, words in {"DEFAULT": [], "OWN": ["--answers", "own"], "NONE": ["--answers", "none"]}.items():
        result = decoders("-o", out, *words)
        assert result.exit_code == 0, result.stderr
        assert ("with the adapters' own answers; prior: iso, ridge 0.001" in result.stdout) == (out != "NONE")
        files[out] = Path(out, "adapter_model.safetensors").read_bytes()
    assert files["DEFAULT"] == files["OWN"] != files["NONE"]
    assert "own answers" in json.loads(Path("OWN/coremerge.json").read_text())["made"]
    assert "own answers" not in json.loads(Path("NONE/coremerge.json").read_text())["made"]


def test_a_dry_run_tells_whose_answers_count_and_what_room_they_may_take(decoders):
    own, none = (json.loads(decoders("-o", "OUT", "--dry-run", "--json", *words).stdout)
                 for words in ([], ["--answers", "none"]))  # fmt: skip
    assert own["answers"] == ["A", "B"] and none["answers"] == []
    assert own["states"]["bytes"] > 5 * none["states"]["bytes"]
    assert "of their own: A, B" in decoders("-o", "OUT", "--dry-run").stdout
    assert "of their own" not in decoders("-o", "OUT", "--dry-run", "--answers", "none").stdout


def test_settings_are_refused_before_anything_is_answered(decoders, monkeypatch):
    monkeypatch.setattr("coremerge.learning.files.answered_batches", lambda *given, **how: pytest.fail("answered"))
    for words, said in {
        ("--rank-budget", "3", "--rank", "2"): "rank_budget",
        ("--rank-budget", "3", "--ridge", "inf"): "rank_budget",
    }.items():
        result = decoders("-o", "OUT", *words)
        assert result.exit_code == 1 and said in result.stderr


def test_a_head_that_was_made_up_answers_nothing(decoders):
    held = load_file("base/model.safetensors")
    save_file(
        {key: value for key, value in held.items() if key != "lm_head.weight"},
        "base/model.safetensors",
        {"format": "pt"},
    )
    result = decoders("-o", "OUT")
    assert result.exit_code == 1 and "lm_head.weight" in result.stderr and "--answers none" in result.stderr
    assert not Path("OUT").exists()
    assert decoders("-o", "OUT", "--answers", "none").exit_code == 0


def test_answers_of_adapters_that_give_none_are_refused(fit):
    result = fit(*DATA, "-o", "OUT", "--answers", "own")
    assert result.exit_code == 1 and not Path("OUT").exists()
    assert "no adapter is of a model that answers" in result.stderr and "--answers" in result.stderr
    assert fit(*DATA, "-o", "OUT", "--answers", "some").exit_code == 2


@pytest.mark.filterwarnings("ignore")  # PEFT asks models what transformers deprecates
def test_names_like_a_decoders_do_not_make_an_encoder_answer(fit):
    from peft import LoraConfig, get_peft_model
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=WORDS, **sizes, **ends))
        model.save_pretrained("base")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["Wqkv"], init_lora_weights=False))
        model.save_pretrained(name)  # of no task type: model.layers.0.attn.Wqkv
    result = fit(*DATA, "-o", "OUT")
    assert result.exit_code == 0 and "2 tasks; prior: iso, ridge 0.1" in result.stdout, result.stderr
    result = fit(*DATA, "-o", "OWN", "--answers", "own")
    assert result.exit_code == 1 and "the base model gives no text" in result.stderr
