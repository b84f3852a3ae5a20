"""coremerge merge, end to end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import coremerge
from coremerge.hashing import file_sha256
from tiny import make_adapter, make_base, modules

ISSUED = (
    "--space core --basis stacked --method ties -p density=0.2 --step isotropize --scale 1.0 --weights 0.5,0.5"
    " --rank exact --dtype float32 --seed 0 --threads 2 -q"
)
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def dense(path):
    return {name: update.dense() for name, update in coremerge.load(path).items()}


def total(*weighted):
    """Σ w_t Δ_t of (path, w_t), over all modules."""
    result = {}
    for path, weight in weighted:
        for name, update in dense(path).items():
            result[name] = result.get(name, 0) + weight * update
    return result


def close(path, expected):
    found = dense(path)
    assert found.keys() == expected.keys()
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], rtol=1e-4, atol=1e-4)  # written in float32


def listing():
    return sorted(path.name for path in Path().iterdir())


def refused(result, *parts, out="OUT"):
    """Exit status 1, exactly one line on stderr that says all of ``parts``, and no output."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert not Path(out).exists()
    assert not [name for name in listing() if name.endswith(".partial")]


def misused(result, *parts):
    assert result.exit_code == 2
    for part in parts:
        assert part in result.stderr
    assert not Path("OUT").exists()


def test_the_options_of_the_issue(run):
    result = run("merge", "A", "B", "-o", "OUT", *ISSUED.split())
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    recipe = coremerge.Recipe(
        method="ties", parameters={"density": 0.2}, steps=["isotropize"], scale=1.0, weights=[0.5, 0.5], rank="exact"
    )
    merged = coremerge.merge([coremerge.load("A"), coremerge.load("B")], recipe).adapter
    close("OUT", {name: update.dense() for name, update in merged.items()})
    assert {t.dtype for t in load_file("OUT/adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("", {}),
        ("--method cart -p rank=3 -p scale=0.8", {"method": "cart", "parameters": {"rank": 3, "scale": 0.8}}),
        (
            "--method dare_ties -p drop_rate=0.5 -p density=0.2 --seed 3",
            {"method": "dare_ties", "parameters": {"drop_rate": 0.5, "density": 0.2}, "seed": 3},
        ),
        ("--method ties", {"method": "ties", "steps": []}),
        ("--no-steps", {"steps": []}),
        ("--step truncate:rank=2 --step isotropize", {"steps": ["truncate:rank=2", "isotropize"]}),
        ("--space knots:scaled=false --method ties", {"space": "knots:scaled=false", "method": "ties"}),
        (
            "--basis balanced --method ties --step balance",
            {"basis": "balanced", "method": "ties", "steps": ["balance"]},
        ),
        ("--scale auto --rank 2", {"rank": 2}),
        ("--device cpu --batch 4", {}),
        ("--normalize --weights 1,3", {"weights": [1, 3], "normalize": True}),
    ],
)
def test_options_are_the_recipe(run, words, recipe):
    assert run("merge", "A", "B", "-o", "OUT", *words.split()).exit_code == 0
    result = coremerge.merge([coremerge.load("A"), coremerge.load("B")], coremerge.Recipe(**recipe))
    close("OUT", {name: update.dense() for name, update in result.adapter.items()})


@pytest.mark.parametrize("form", ["-0.5,2", "B=2,A=-0.5", "{folder}/B=2,A=-0.5", "w.json", "w.yaml"])
def test_weights(run, form, tmp_path):
    Path("w.json").write_text('{"A": -0.5, "B": 2}')
    Path("w.yaml").write_text("[-0.5, 2]")
    form = form.format(folder=tmp_path)
    sources = [str(tmp_path / "A"), str(tmp_path / "B")]
    words = ["-o", "OUT", "--method", "sum", "--scale", "1", f"--weights={form}"]
    assert run("merge", *sources, *words).exit_code == 0
    close("OUT", total(("A", -0.5), ("B", 2)))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a=b", "a=b=-0.5,B=2"),
        ("lr=1e-4,r=8", '{"lr=1e-4,r=8": -0.5, "B": 2}'),
        ("c,d", "c,d=-0.5,B=2"),
        ("c,d", "B=2,c,d=-0.5"),
        ("no", "w.yaml"),
        ("0x10", "w.yaml"),
        ("12:30", "w.yaml"),
        ("null", "w.json"),
        ("B=2", "B=2=-0.5,B=2"),
    ],
)
def test_any_name_can_be_weighted(run, name, form):
    Path("A").rename(name)
    Path("w.yaml").write_text(f"{name}: -0.5\nB: 2\n")
    Path("w.json").write_text(json.dumps({name: -0.5, "B": 2}))
    words = ["-o", "OUT", "--method", "sum", "--scale", "1", f"--weights={form}"]
    assert run("merge", name, "B", *words).exit_code == 0
    close("OUT", total((name, -0.5), ("B", 2)))


@pytest.mark.parametrize("name", ["no", "on", "1e3", "0x10", "12:30", "true", "16", "'null'"])
def test_a_recipe_names_adapters_as_they_are_called(run, name):
    Path("A").rename(name.strip("'"))
    Path("r.yaml").write_text(f"merge_method: sum\nscale: 1\nmodels: [{name}, {{model: B, parameters: {{weight: 2}}}}]")
    assert run("merge", "--recipe", "r.yaml", "-o", "OUT").exit_code == 0
    close("OUT", total((name.strip("'"), 1), ("B", 2)))


def test_a_path_with_an_equals_sign_is_a_path(run):
    make_adapter(Path("P"), seed=8, init_lora_weights="pissa")
    make_adapter(Path("step=1"), seed=9, init_lora_weights="pissa")
    Path("P").rename("a=b")
    assert run("merge", "a=b", "B", "-o", "OUT", "--initial", "a=b=step=1").exit_code == 0


def test_a_basis_without_effect_is_said(run):
    result = run("merge", "A", "B", "-o", "OUT", "--space", "full", "--basis", "balanced")
    assert result.exit_code == 0
    assert "warning: basis balanced has no effect: the full space has no basis to choose" in result.stderr


def test_a_negative_weight_may_be_a_word_of_its_own(run):
    result = run("merge", "A", "B", "-o", "OUT", "--method", "sum", "--scale", "1.0", "--weights", "-1,1")
    assert result.exit_code == 0
    close("OUT", total(("A", -1), ("B", 1)))


def test_weights_per_module(run):
    Path("w.yml").write_text(yaml.safe_dump({"A": {Q0: 0.0}}))
    assert run("merge", "A", "B", "-o", "OUT", "--method", "sum", "--scale", "1", "--weights", "w.yml").exit_code == 0
    both, only = total(("A", 1), ("B", 1)), dense("B")
    close("OUT", {**both, Q0: only[Q0]})


def test_what_is_printed(run):
    result = run("merge", "A", "B", "C", "-o", "OUT")
    told = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    told = {key: value.strip() for key, value in told.items()}
    assert told["merged"] == "3 adapters: A, B, C"
    assert told["modules"] == "4, of which 1 in every adapter"
    assert told["method"] == "whiten (even=0.97), in core space, stacked basis"
    assert told["even"] == "0.97, as the adapters are of a language model that generates (CAUSAL_LM)"
    assert told["norms"].startswith("made equal before merging: A × ")
    assert told["scale"].endswith("(auto)")
    assert told["rank"] == "12"
    assert told["energy lost"] == "none"
    assert told["written to"] == "OUT"
    assert result.stderr == "warning: C lacks 3 of 4 modules: it contributes nothing there\n"


def test_a_cut_that_loses_much_is_warned_of(run):
    result = run("merge", "A", "B", "-o", "OUT", "--rank", "2")
    assert "%" in result.stdout
    assert result.stderr.startswith("warning: the cut to rank 2 loses")


def test_a_scale_by_the_base(run):
    refused(run("merge", "A", "B", "-o", "OUT", "--scale", "base"), "scale", "base", "--base")
    refused(run("merge", "A", "B", "-o", "OUT", "--scale", "base", "--base", "nowhere"), "nowhere")
    refused(run("merge", "A", "B", "--dry-run", "--scale", "base", "--base", "nowhere"), "nowhere")
    make_base(Path("base"))
    plain = json.loads(run("merge", "A", "B", "-o", "OUT", "--json").stdout)
    held = json.loads(run("merge", "A", "B", "-o", "HELD", "--scale", "base", "--base", "base", "--json").stdout)
    assert 0 < held["report"]["scale"] < plain["report"]["scale"]
    assert "(base)" in run("merge", "A", "B", "-o", "TOO", "--scale", "base", "--base", "base").stdout
    into = run("merge", "A", "B", "-o", "MODEL", "--scale", "base", "--into", "base", "--json")
    assert json.loads(into.stdout)["report"]["scale"] == held["report"]["scale"]
    assert (
        "held to what the base's weights bear"
        in run("merge", "A", "B", "--scale", "base", "--base", "base", "--dry-run").stdout
    )


def test_quiet_is_silent(run):
    result = run("merge", "A", "B", "C", "-o", "OUT", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_json(run):
    result = run("merge", "A", "B", "C", "-o", "OUT", "--json")
    found = json.loads(result.stdout)
    assert found["output"]["path"] == "OUT"
    assert found["output"]["rank"] == found["report"]["rank"] <= 12
    assert found["plan"]["adapters"][1]["name"] == "B"
    assert found["recipe"]["method"] == "whiten"
    assert found["report"]["modules"][Q0]["ranks"] == {"A": 4, "B": 6, "C": 2}
    assert len(found["sha256"]["A"]["adapter_model.safetensors"]) == 64
    assert found["seconds"] > 0
    assert result.stderr.startswith("warning: ")


def test_json_and_quiet(run):
    result = run("merge", "A", "C", "-o", "OUT", "--json", "-q")
    assert json.loads(result.stdout)["output"]["bytes"] > 0
    assert result.stderr == ""


def test_the_card(run):
    words = ["merge", "A", "B", "-o", "OUT", "--method", "ties", "-p", "density=0.3", "--weights", "A=0.5", "-q"]
    assert run(*words).exit_code == 0
    card = Path("OUT/README.md").read_text(encoding="utf-8")
    assert shlex.join(["coremerge", *words]) in card
    assert "density: 0.3" in card
    for name in "AB":
        assert file_sha256(Path(name, "adapter_model.safetensors")) in card


def test_labels_that_coincide_are_told_apart(run):
    make_adapter(Path("other/A"), seed=7)
    words = ["--method", "sum", "--scale", "1", "--weights", "A=1,other/A=3", "--json"]
    result = run("merge", "A", "other/A", "-o", "OUT", *words)
    assert [a["name"] for a in json.loads(result.stdout)["plan"]["adapters"]] == ["A", "other/A"]
    close("OUT", total(("A", 1), ("other/A", 3)))


def test_a_file_is_a_source_and_so_is_a_single_adapter(run):
    result = run("merge", "A/adapter_model.safetensors", "-o", "OUT", "--method", "sum")
    assert result.exit_code == 0
    close("OUT", dense("A"))


class TestZeros:
    def test_what_adds_nothing_is_one_warning(self, run):
        make_adapter(Path("N"), lora_alpha=0)
        result = run("merge", "A", "N", "-o", "OUT")
        assert result.exit_code == 0
        assert result.stderr.count("warning: N adds nothing to the merge") == result.stderr.count("\n") == 1
        assert "N adds nothing" in run("merge", "A", "N", "--dry-run").stderr

    def test_nothing_but_zeros_is_refused_unless_asked_for(self, run):
        make_adapter(Path("N"), lora_alpha=0)
        refused(run("merge", "N", "-o", "OUT"), "nothing to merge", "(N)", "lora_alpha")
        result = run("merge", "A", "B", "-o", "OUT", "--scale", "0")
        assert "energy lost  all: the result is zero" in result.stdout
        assert "warning: the scale is 0" in result.stderr


class TestRecipeFile:
    @pytest.fixture
    def recipe(self, run):
        Path("r.yaml").write_text(
            "merge_method: ties\n"
            "models:\n  - model: A\n    parameters: {weight: 0.5}\n  - model: B\n"
            "parameters: {density: 0.5, reduce: sum}\n"
            "steps: [isotropize]\nscale: 1.0\nrank: 3\n"
        )
        return lambda *words: json.loads(run("merge", "--recipe", "r.yaml", "--dry-run", "--json", *words).stdout)

    def test_names_the_adapters(self, recipe):
        found = recipe()
        assert [a["name"] for a in found["plan"]["adapters"]] == ["A", "B"]
        assert found["recipe"]["weights"] == [0.5, 1.0]
        assert found["recipe"]["parameters"] == {"density": 0.5, "reduce": "sum"}

    def test_options_override_it(self, recipe):
        found = recipe("C", "B", "--rank", "2", "-p", "density=0.25", "--weights", "B=3")
        assert [a["name"] for a in found["plan"]["adapters"]] == ["C", "B"]
        assert found["recipe"]["parameters"] == {"density": 0.25, "reduce": "sum"}
        assert (found["recipe"]["rank"], found["recipe"]["scale"]) == (2, 1.0)
        assert found["recipe"]["weights"] == {"B": 3.0}

    def test_another_method_brings_its_own_parameters(self, recipe):
        found = recipe("--method", "dare")["recipe"]
        assert (found["method"], found["parameters"], found["steps"]) == ("dare", {}, ["isotropize"])

    def test_what_is_made_of_it_is_said(self, run):
        Path("r.yaml").write_text(
            "merge_method: linear\nbase_model: base\nmodels: [base, A, B]\ntokenizer_source: base\n"
        )
        result = run("merge", "--recipe", "r.yaml", "-o", "OUT")
        assert result.exit_code == 0
        for said in (
            "note: base is the base model",
            "note: tokenizer_source of the recipe",
            "note: linear without a scale",
        ):
            assert said in result.stderr
        assert "note" not in run("merge", "--recipe", "r.yaml", "-o", "OUT", "--overwrite", "-q").stderr

    def test_equal_norms_go_with_the_default_method(self, run):
        Path("r.yaml").write_text("rank: 3\n")
        words = ["merge", "A", "B", "--recipe", "r.yaml", "--dry-run", "--json"]
        assert json.loads(run(*words).stdout)["recipe"]["norms"] == "equal"
        assert json.loads(run(*words, "--norms", "own").stdout)["recipe"]["norms"] == "own"
        Path("n.yaml").write_text("norms: equal\n")
        named = ["merge", "A", "B", "--recipe", "n.yaml", "--method", "sum", "--dry-run", "--json"]
        assert json.loads(run(*named).stdout)["recipe"]["norms"] == "equal"
        assert json.loads(run(*words, "--method", "ties").stdout)["recipe"]["norms"] == "own"
        assert json.loads(run(*words, "--method", "ties", "--norms", "equal").stdout)["recipe"]["norms"] == "equal"

    def test_merges(self, run, recipe):
        assert run("merge", "--recipe", "r.yaml", "-o", "OUT").exit_code == 0
        assert coremerge.load("OUT").modules[Q0].rank == 3

    def test_that_is_wrong_is_refused(self, run):
        Path("r.yaml").write_text("merge_methd: ties\n")
        refused(run("merge", "A", "B", "--recipe", "r.yaml", "-o", "OUT"), "r.yaml", "merge_methd")
        refused(run("merge", "A", "B", "--recipe", "none.yaml", "-o", "OUT"), "none.yaml")


class TestDryRun:
    def test_prints_the_plan_and_writes_nothing(self, run):
        before = listing()
        result = run("merge", "A", "B", "C", "-o", "OUT", "--dry-run")
        assert result.exit_code == 0
        assert listing() == before
        lines = result.stdout.splitlines()
        row = next(line for line in lines if line.startswith("model.layers.0.self_attn.q_proj"))
        assert row.split() == ["model.layers.0.self_attn.q_proj", "1", "24", "x", "24", "linear", "4", "6", "2", "12"]
        grouped = next(line for line in lines if "[0-1].self_attn.v_proj" in line)
        assert grouped.split()[1:] == ["2", "12", "x", "24", "linear", "4", "6", "-", "10"]
        assert "OUT (not written: dry run)" in result.stdout
        assert result.stderr.startswith("warning: C lacks 3 of 4 modules")

    def test_many_adapters_share_a_column(self, run):
        names = [str(make_adapter(Path(f"A{i}"), 2 + i, seed=i)) for i in range(5)]
        shown = run("merge", *names, "C", "--dry-run").stdout
        assert "ranks, in this order" in shown
        assert "  2 3 4 5 6 2  " in shown and "  2 3 4 5 6 -  " in shown

    def test_needs_no_output(self, run):
        result = run("merge", "A", "B", "--dry-run", "--rank", "3", "--weights", "0.5,2")
        assert "at most 3, as asked" in result.stdout
        assert "weight" in result.stdout.splitlines()[0]

    def test_quiet(self, run):
        assert run("merge", "A", "B", "C", "--dry-run", "-q").output == ""

    def test_says_what_becomes_of_whole_tensors(self, run):
        two_heads()
        result = run("merge", "H1", "H2", "--dry-run", "--extras", "drop")
        assert "score.weight" in result.stdout
        assert "dropped: score.weight: dropped, as asked\n" in result.stderr

    def test_into_a_base(self, run):
        make_base(Path("base"))
        result = run("merge", "A", "B", "--dry-run", "--into", "base")
        assert "base" in result.stdout
        assert "the base's own" in result.stdout


def two_heads():
    head = torch.ones(3, 24)
    for i, name in enumerate(("H1", "H2")):
        make_adapter(Path(name), seed=i, extra={"score.weight": head + i}, modules_to_save=["score"])


class TestExtras:
    @pytest.mark.parametrize(("policy", "value"), [("H1", 1.0), ("H2", 2.0), ("average", 1.5)])
    def test_policies(self, run, policy, value):
        two_heads()
        result = run("merge", "H1", "H2", "-o", "OUT", "--extras", policy)
        assert "note: score.weight: " in result.stderr
        assert (load_file("OUT/adapter_model.safetensors")["base_model.model.score.weight"] == value).all()

    def test_dropped_ones_are_told(self, run):
        two_heads()
        result = run("merge", "H1", "H2", "-o", "OUT", "--extras", "drop")
        assert "dropped: score.weight: dropped, as asked\n" in result.stderr
        assert "score.weight" in Path("OUT/README.md").read_text()

    def test_different_ones_are_refused(self, run):
        two_heads()
        refused(run("merge", "H1", "H2", "-o", "OUT"), "score.weight", "--extras")
        refused(run("merge", "H1", "H2", "-o", "OUT", "--extras", "H9"), "H9", "H1, H2")

    def test_an_adapter_may_be_named_by_its_source(self, run):
        two_heads()
        assert run("merge", "./H1/", "./H2/", "-o", "OUT", "--extras", "./H2/").exit_code == 0


class TestInto:
    def test_adds_the_update_to_the_base(self, run):
        make_base(Path("base"))
        words = ["--into", "base", "--method", "sum", "--scale", "1", "--dtype", "float32"]
        result = run("merge", "A", "C", "-o", "OUT", *words)
        assert result.exit_code == 0
        before, after = load_file("base/model.safetensors"), load_file("OUT/model.safetensors")
        update = total(("A", 1), ("C", 1))
        for name in modules():
            torch.testing.assert_close(
                after[f"{name}.weight"].double(), before[f"{name}.weight"].double() + update[name], rtol=1e-4, atol=1e-4
            )
        assert "The base model of `base`, with 2 adapters merged into its weights" in Path("OUT/README.md").read_text()
        assert "\ninto         base\n" in result.stdout

    def test_json(self, run):
        make_base(Path("base"))
        found = json.loads(run("merge", "A", "-o", "OUT", "--into", "base", "--json").stdout)
        assert found["output"]["rank"] is None
        assert found["output"]["files"] == ["model.safetensors"]

    def test_files_that_do_not_change_may_be_links(self, run):
        tensors = load_file(make_base(Path("base")) / "model.safetensors")
        Path("base/model.safetensors").unlink()
        home = {key: f"model-{key.split('.')[2]}.safetensors" for key in tensors}
        for name in set(home.values()):
            save_file({key: t for key, t in tensors.items() if home[key] == name}, f"base/{name}")
        Path("base/model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
        words = ("merge", "C", "--into", "base")
        planned = [json.loads(run(*words, "--dry-run", "--json", how).stdout) for how in ("--link", "--copy")]
        assert planned[0]["cost"]["bytes_written"] == planned[1]["cost"]["bytes_written"] / 2
        assert "note: hard links to the base's own files" in run(*words, "-o", "OUT", "--link").stderr
        assert "link" not in run(*words, "-o", "COPY").stderr
        assert Path("OUT/model-1.safetensors").samefile("base/model-1.safetensors")
        for name in ("COPY/model-1.safetensors", "OUT/model-0.safetensors", "OUT/config.json"):
            assert not Path(name).samefile(Path("base", Path(name).name))
        refused(run("merge", "A", "-o", "MORE", "--link"), "link: there is no base model", out="MORE")

    def test_a_base_that_does_not_fit_is_refused_before_any_work(self, run, monkeypatch):
        make_base(Path("base"), layers=1)
        monkeypatch.setattr("coremerge.pipeline.execute", None)
        refused(run("merge", "A", "B", "-o", "OUT", "--into", "base"), "model.layers.1.self_attn.q_proj")


class TestReading:
    def test_a_pickle_only_when_asked(self, run):
        tensors = load_file("B/adapter_model.safetensors")
        Path("B/adapter_model.safetensors").unlink()
        torch.save(tensors, "B/adapter_model.bin")
        refused(run("merge", "A", "B", "-o", "OUT"), "adapter_model.bin", "--allow-pickle")
        assert run("merge", "A", "B", "-o", "OUT", "--allow-pickle").exit_code == 0

    def test_an_initial_adapter(self, run):
        make_adapter(Path("P"), seed=8, init_lora_weights="pissa")
        make_adapter(Path("P0"), seed=9, init_lora_weights="pissa")
        refused(run("merge", "A", "P", "-o", "OUT"), "pissa", "--initial NAME=PATH")
        words = ["merge", "A", "P", "-o", "OUT", "--method", "sum", "--scale", "1"]
        refused(run(*words, "--initial", "Q=P0"), "no adapter of that name", '"Q"')
        assert run(*words, "--initial", "P=P0").exit_code == 0
        trained = dense_of_trained()
        close("OUT", {name: update + trained[name] for name, update in dense("A").items()})

    def test_a_vera_adapter_needs_its_width(self, run):
        make_vera(Path("V"))
        refused(run("merge", "A", "V", "-o", "OUT"), "V/adapter_config.json", "--base", "--vera-width")
        assert run("merge", "A", "V", "-o", "OUT", "--vera-width", "24").exit_code == 0
        assert run("merge", "A", "V", "-o", "OUT2", "--base", str(make_base(Path("base")))).exit_code == 0

    def test_adapters_without_a_common_module(self, run):
        make_adapter(Path("K"), parts=("k_proj",))
        refused(run("merge", "A", "K", "-o", "OUT"), "no module in common", "--allow-disjoint")
        assert run("merge", "A", "K", "-o", "OUT", "--allow-disjoint").exit_code == 0


def dense_of_trained():
    """s · (B A − B₀ A₀) of P and P0, straight from their files."""
    files = [load_file(f"{name}/adapter_model.safetensors") for name in ("P", "P0")]
    result = {}
    for name in modules():
        key = f"base_model.model.{name}.lora_"
        trained, start = (2 * f[f"{key}B.weight"].double() @ f[f"{key}A.weight"].double() for f in files)
        result[name] = trained - start
    return result


def make_vera(folder):
    """A VeRA adapter without its projection."""
    from safetensors.torch import save_file

    tensors = {}
    for name, (out, _) in modules().items():
        tensors[f"base_model.model.{name}.vera_lambda_b"] = torch.ones(out)
        tensors[f"base_model.model.{name}.vera_lambda_d"] = torch.ones(3)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "VERA", "r": 3, "projection_prng_key": 0, "save_projection": False, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            ("A nowhere", ["nowhere", "no such file or folder"]),
            ("A broken", ["broken", "adapter_model.safetensors"]),
            ("A notes.txt", ["notes.txt"]),
            ("A empty", ["empty", "the folder is empty"]),
            ("A B --method tie", ["'tie'", "Did you mean 'ties'"]),
            ("A B --method ties -p densty=0.2", ["densty", "density"]),
            ("A B --method ties -p density=2", ["density = 2"]),
            ("A B --method ties -p density=[", ["density", "["]),
            ("A B --weights broken.json", ["broken.json", "not JSON"]),
            ("./A B --weights A=1,./A=2", ["A is there twice, as ./A, too"]),
            ("A B --weights lr=1,r=8=2", ['"lr"', "A, B"]),
            ("A B --space cor", ["'cor'", "core"]),
            ("A B --step isotropise", ["isotropise", "isotropize"]),
            ("A B --basis odd", ["basis", "odd"]),
            ("A B --dtype int8", ["dtype", "int8"]),
            ("A B --scale nan", ["scale"]),
            ("A B --weights 1,2,3", ["3 weights for 2 adapters"]),
            ("A B --weights X=1", ['"X"', "A, B"]),
            ("A B --weights none.json", ["none.json"]),
            ("A B --weights word.json", ["word.json", "mapping"]),
            ("A B --device nowhere", ["device", "nowhere", "--device cpu"]),
            ("A nan", ["nan/adapter_model.safetensors", "NaN"]),
        ],
    )
    def test_one_message_and_no_output(self, run, words, parts):
        Path("empty").mkdir()
        Path("notes.txt").write_text("x")
        Path("word.json").write_text('"x"')
        Path("broken.json").write_text("{")
        make_adapter(Path("broken"))
        Path("broken/adapter_model.safetensors").write_bytes(b"not a tensor file")
        make_adapter(Path("nan"), extra=None)
        tensors = load_file("nan/adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = float("nan")
        from safetensors.torch import save_file

        save_file(tensors, "nan/adapter_model.safetensors")
        refused(run("merge", *words.split(), "-o", "OUT"), *parts)

    def test_an_output_that_exists(self, run):
        make_adapter(Path("OLD"), seed=5)
        kept = Path("OLD/adapter_model.safetensors").read_bytes()
        result = run("merge", "A", "B", "-o", "OLD")
        refused(result, "OLD", "--overwrite")
        assert Path("OLD/adapter_model.safetensors").read_bytes() == kept
        assert run("merge", "A", "B", "-o", "OLD", "--overwrite").exit_code == 0
        assert Path("OLD/adapter_model.safetensors").read_bytes() != kept

    def test_an_output_that_exists_is_found_before_the_inputs_are_read(self, run):
        refused(run("merge", "nowhere", "-o", "A"), "A: exists")

    def test_an_output_over_an_input(self, run):
        refused(run("merge", "A", "B", "-o", "A", "--overwrite"), "A")
        assert Path("A/adapter_config.json").exists()

    def test_a_full_disk(self, run, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device", "OUT")

        monkeypatch.setattr("coremerge.pipeline.save", full)
        refused(run("merge", "A", "B", "-o", "OUT"), "OUT: No space left on device. Check that")

    def test_a_stream_that_takes_nothing(self, run, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("coremerge.cli.merge._show_result", full)
        refused(run("merge", "A", "B", "-o", "OUT"), "cannot print: No space left on device. Print elsewhere", out="-")
        assert Path("OUT/adapter_model.safetensors").exists()

    def test_too_little_memory(self, run, monkeypatch):
        def full(*_, **__):
            raise MemoryError

        monkeypatch.setattr("coremerge.pipeline.execute", full)
        refused(run("merge", "A", "B", "-o", "OUT"), "out of memory", "--threads")

        def device_full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        monkeypatch.setattr("coremerge.pipeline.execute", device_full)
        refused(run("merge", "A", "B", "-o", "OUT"), "out of memory on CUDA", "--batch")

    def test_names_cannot_command_the_terminal(self, run):
        refused(run("merge", "A", "\x1b[31mred\x07", "-o", "OUT"), "[31mred")
        assert "\x1b" not in run("merge", "A", "\x1b[31mred", "-o", "OUT").stderr
        make_adapter(Path("odd \x1b[2J\u202e[/]"), base_model_name_or_path="\x9b2J\x1b]0;x\x07", task_type="\x1b[5m")
        for words in (("-o", "OUT"), ("--dry-run",), ("--dry-run", "--json")):
            result = run("merge", "odd \x1b[2J\u202e[/]", "B", *words)
            assert result.exit_code == 0
            assert all(line == "" or line.isprintable() for line in (result.stdout + result.stderr).split("\n"))
        kept = Path("OUT/README.md").read_text()
        assert all(line == "" or line.isprintable() for line in kept.split("\n"))

    def test_secrets_are_neither_said_nor_kept(self, run, monkeypatch):
        token, word = "hf_" + "a" * 34, "of-our-own-hub"
        monkeypatch.setenv("HF_TOKEN", word)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        said = []
        for source in (f"https://me:{token}@host/a", f"https://host/a?token={token}", word, f"org/{token}"):
            result = run("merge", "A", source, "-o", "OUT")
            assert result.exit_code == 1
            said.append(result.stderr)
        Path(word).mkdir()
        result = run(
            "merge", "A", "B", "-o", f"{word}/OUT", "--resume", "--report", "--json", "--recipe", recipe(token)
        )
        assert result.exit_code == 0, result.stderr
        files = [file for file in Path(word).rglob("*") if file.is_file()]
        assert {file.name for file in files} > {"README.md", "coremerge.json", "report.html"}
        said += [result.stdout, result.stderr, *(file.read_bytes().decode(errors="replace") for file in files)]
        assert not any(secret in text for text in said for secret in (token, word))


def recipe(token):
    Path(f"{token}.yaml").write_text("merge_method: sum")
    return f"{token}.yaml"


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            ("-o OUT", ["at least one adapter"]),
            ("A B", ["--out"]),
            ("A -o OUT --bogus", ["--bogus"]),
            ("A -o OUT --scale big", ["'big'", "--scale"]),
            ("A -o OUT --rank 0", ["'0'", "--rank"]),
            ("A -o OUT --rank many", ["'many'", "exact"]),
            ("A -o OUT --seed x", ["--seed"]),
            ("A -o OUT --threads 0", ["--threads"]),
            ("A -o OUT -p density", ["'density'", "KEY=VALUE"]),
            ("A -o OUT --weights a,b", ["'a'", "--weights"]),
            ("A B -o OUT --weights A=1,A=2", ["'A' is there twice", "--weights"]),
            ("A B -o OUT --weights A=1,B=", ["'B=' is not", "--weights"]),
            ("A B -o OUT --weights A=1,B", ["'B' is not", "--weights"]),
            ('A B -o OUT --weights {"A":1,"A":2}', ["not JSON: 'A' is there twice"]),
            ("A -o OUT --method ties -p density=1 -p density=0.2", ["'density' is there twice"]),
            ("A B -o OUT --initial A=x --initial A=y", ["'A' is there twice"]),
            ("A -o OUT --initial P0", ["NAME=PATH"]),
            ("A -o OUT --step isotropize --no-steps", ["--no-steps"]),
        ],
    )
    def test_is_exit_status_two(self, run, words, parts):
        misused(run("merge", *words.split()), *parts)

    def test_nothing_at_all_shows_the_help(self, run):
        misused(run("merge"), "Usage: coremerge merge")
        misused(run(), "Usage: coremerge")

    def test_an_unknown_command(self, run):
        misused(run("merg"), "merg")


def test_an_interrupt_leaves_nothing(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("coremerge.formats.safetensors_layout.TensorFile.write", interrupted)
    before = listing()
    assert run("merge", "A", "B", "-o", "deep/OUT").exit_code == 130
    assert listing() == before


@pytest.mark.parametrize("resume", [[], ["--resume"], ["--into", "A"]])
@pytest.mark.parametrize("out", ["x" * 300, f"new/{'x' * 300}/OUT", "é" * 130, "/".join(["y" * 90] * 50)])
def test_a_place_whose_name_is_too_long_is_called_that(run, out, resume):
    before = listing()
    result = run("merge", "A", "B", "-o", out, *resume)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and len(result.stderr) < 300
    assert "bytes, and the" in result.stderr and "Choose a shorter" in result.stderr
    assert listing() == before


def test_an_amount_of_memory(run):
    assert run("merge", "A", "B", "-o", "OUT", "--max-memory", "8GB").exit_code == 0
    assert run("merge", "A", "B", "-o", "OTHER").exit_code == 0
    assert Path("OUT/adapter_model.safetensors").read_bytes() == Path("OTHER/adapter_model.safetensors").read_bytes()
    for more in ([], ["--dry-run"]):
        refused(
            run("merge", "A", "B", "-o", "NO", "--max-memory", "1.5 mib", *more), "max_memory", "too little", out="NO"
        )
    told = run("merge", "A", "B", "-o", "NO", "--max-memory", "8K").stderr
    assert 'max_memory = "8 kB": too little: with one thread it needs up to' in told
    for bare in ("8", "1.5", "640000"):
        result = run("merge", "A", "B", "-o", "NO", "--max-memory", bare)
        assert result.exit_code == 2 and f"write {bare}GB or {bare}MB" in " ".join(result.stderr.split())
    result = run("merge", "A", "B", "-o", "NO", "--max-memory", "much")
    assert result.exit_code == 2 and "no amount of memory" in result.stderr


def test_it_goes_on_after_a_stop(run, monkeypatch):
    from coremerge.formats import writer

    def fail(*_, **__):
        raise coremerge.CoremergeError("no")

    assert run("merge", "A", "B", "-o", "WHOLE").exit_code == 0
    before = listing()
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_module", fail)
        result = run("merge", "A", "B", "-o", "OUT", "--resume")
    assert result.exit_code == 1 and "the same command goes on from there" in result.stderr
    assert listing() == sorted([*before, ".OUT.resume"])
    assert run("merge", "A", "B", "-o", "OUT", "--resume").exit_code == 0
    assert listing() == sorted([*before, "OUT"])
    assert Path("OUT/adapter_model.safetensors").read_bytes() == Path("WHOLE/adapter_model.safetensors").read_bytes()


class TestRename:
    def two_names(self):
        make_adapter(Path("plain"))
        held = load_file("plain/adapter_model.safetensors")
        moved = {key.replace("model.layers", "net.body.layers"): value for key, value in held.items()}
        make_adapter(Path("moved"))
        save_file(moved, "moved/adapter_model.safetensors")

    def test_the_remedy_of_the_refusal_works(self, run):
        self.two_names()
        result = run("merge", "plain", "moved", "-o", "OUT")
        refused(result, "no module in common", "--rename ", "--allow-disjoint")
        option = result.stderr.partition("--rename ")[2].partition(". ")[0]
        assert (
            run(*f"merge plain moved -o OUT --method sum --scale 1 --no-steps -q --rename {option}".split()).exit_code
            == 0
        )
        assert len(coremerge.load("OUT")) == 4
        report = run("merge", "plain", "moved", "--dry-run", "--rename", "net.body=model")
        assert report.exit_code == 0 and "now begin with" in report.stderr

    def test_inspect_compares_under_one_name(self, run):
        self.two_names()
        assert "would be refused" in run("inspect", "plain", "moved").stderr
        result = run("inspect", "plain", "moved", "--json", "--rename", "net.body=model")
        assert json.loads(result.stdout)["alignment"]["pairs"][0]["cosine"] == pytest.approx(1)

    def test_a_mistyped_one(self, run):
        self.two_names()
        misused(run("merge", "plain", "moved", "-o", "OUT", "--rename", "net.body"), "--rename", "OLD=NEW")
        refused(run("merge", "plain", "moved", "-o", "OUT", "--rename", "nix=model"), "rename", "nix")
