"""The report of a merge, from its folder."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from coremerge import LowRank, Recipe, load
from coremerge.errors import ConfigError, SourceError
from coremerge.learning import Weights
from coremerge.pipeline import merge_files
from coremerge.report.gather import gather, places_of, read_inputs
from coremerge.report.page import report_page
from coremerge.report.record import FILE, read_record
from tiny import make_adapter

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of A, B and C, where they were made."""
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "A", seed=1)
    make_adapter(tmp_path / "B", 6, seed=2, use_rslora=True)
    make_adapter(tmp_path / "C", 2, seed=3, layers=1, parts=("q_proj",))
    return merge(Recipe())


def merge(recipe: Recipe, **settings: Any) -> Path:
    merge_files(["A", "B", "C"], "OUT", recipe, overwrite=True, command=["coremerge", "merge", "A & B"], **settings)
    return Path("OUT")


class Text(HTMLParser):
    """What a person reads, and that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not any(key in ("src", "href") and not str(value).startswith("data:") for key, value in attrs)
        assert tag != "script"
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def text(page: str) -> str:
    return " ".join(" ".join(Text(page).said).split())


def test_the_record_says_what_went_in_and_does_not_change_between_runs(merged: Path) -> None:
    record = read_record(merged)
    assert [entry["name"] for entry in record["inputs"]] == ["A", "B", "C"]
    assert record["inputs"][1]["ranks"] == [6]
    assert set(record["inputs"][0]["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert (record["recipe"]["method"], record["into"]) == ("whiten", None)
    before = (merged / FILE).read_bytes()
    merge(Recipe())
    assert (merged / FILE).read_bytes() == before


def test_every_part_is_there(merged: Path) -> None:
    said = text(report_page(merged))
    for words in (
        "Merged adapter OUT", "whiten, core space", "made equal before merging: A × ", "What went in",
        "How alike the adapters are",
        "What the merge keeps of each adapter", "How strong it is", "Spectra", "coremerge merge 'A & B'",
    ):  # fmt: skip
        assert words in said


def test_what_the_method_cuts_of_each_adapter_is_said(merged: Path) -> None:
    merge(Recipe(method="tsv", parameters={"rank": 4}))
    record = read_record(merged)
    cut = 4
    squares = [update.svd.descending.values.square() for update in load("B").values()]
    share = sum(float(x[:cut].sum()) for x in squares) / sum(float(x.sum()) for x in squares)
    assert record["input_kept"] == {"A": 1.0, "B": pytest.approx(share), "C": 1.0}
    said = text(report_page(merged))
    assert f"tsv (rank=4) keeps at most 4 directions of each adapter: of its energy 100 % (A), {share:.0%}"[:-1] in said
    assert "Nothing was dropped" not in said and "energy merged" in said


def test_nothing_dropped_is_said_where_that_is_so(merged: Path) -> None:
    make_adapter(Path("D"), 3, seed=4)
    merge_files(["A", "D"], "TWO", Recipe(rank="exact"))
    assert "Nothing was dropped, cut or assumed." in text(report_page("TWO"))
    merge_files(["A", "B"], "TWO", Recipe(method="sum"), overwrite=True)
    assert "Nothing was dropped, cut or assumed." in text(report_page("TWO"))


def test_a_small_cut_of_the_result_is_said_too(merged: Path) -> None:
    merge_files(["A", "B"], "TWO", Recipe(method="sum", rank=9))
    lost = read_record("TWO")["energy_lost"]
    assert 0 < lost < 0.1
    said = text(report_page("TWO"))
    assert f"the cut to rank 9 loses {100 * lost:.1f} % of the merged update's energy" in said
    assert "energy lost by the cut to that rank" in said


def test_a_record_of_an_older_version_is_drawn(merged: Path) -> None:
    merge(Recipe(method="tsv", parameters={"rank": 4}))
    record = json.loads((merged / FILE).read_text())
    del record["input_kept"], record["norm_factors"], record["recipe"]["norms"]
    for module in record["modules"].values():
        del module["input_energy"], module["input_kept"]
    (merged / FILE).write_text(json.dumps(record))
    assert "tsv (rank=4) keeps at most 4 directions of each adapter" in text(report_page(merged))


def test_an_adapter_that_drowns_the_others_is_remarked_on(merged: Path) -> None:
    assert "as strongly as the others" not in text(report_page(merged))
    config = json.loads(Path("B/adapter_config.json").read_text())
    Path("B/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10 * config["lora_alpha"]}))
    assert "as strongly as the others" not in text(report_page(merge(Recipe())))
    said = text(report_page(merge(Recipe(norms="own"))))
    assert "B counts" in said and "times as strongly as the others" in said
    assert "as strongly as the others" not in text(report_page(merge(Recipe(norms="own", weights=[1.0, 0.1, 1.0]))))


def test_a_fit_shows_its_errors_and_where_the_prior_is_kept(merged: Path) -> None:
    record = json.loads((merged / FILE).read_text())
    first, second, *_ = record["modules"]
    fits = {
        first: {"tokens": 9, "prior": 0.5, "fitted": 0.25, "kept": False, "lost": 0.02},
        second: {"tokens": 9, "prior": 0.75, "fitted": 0.8, "kept": True},
    }
    fit = {"prior": "iso", "ridge": 0.3, "outputs_lost": 0.01, "modules": fits}
    record |= {"made": "fitted to 9 inputs", "fit": fit, "input_kept": {}}
    (merged / FILE).write_text(json.dumps(record))
    page = report_page(merged)
    said = text(page)
    assert "How well it is fitted" in said and "On average 0.5; the prior's (iso) 0.625" in said
    assert "q_proj, 0: 0.25 (the prior's: 0.50)" in said and "v_proj, 0: 0.75 (the prior's: 0.75, kept)" in said
    assert page.count('class="ring"') == 1
    assert f"1 of 2 modules keep the prior: {second}" in said
    assert f"No input reached {len(record['modules']) - 2} of {len(record['modules'])} modules" in said
    assert "q_proj, 0: 0.020" in said
    assert "tsv (rank=4) keeps" not in said
    assert "the cut to rank loses 1.0 % of the merged outputs" in said
    fits[first]["checked"] = fits[second]["checked"] = False
    (merged / FILE).write_text(json.dumps(record))
    said = text(report_page(merged))
    assert f"Too few inputs to hold some out for 2 of 2 modules: {first}, {second}" in said
    assert "error on held-out inputs" not in said


def test_the_numbers_are_those_of_the_diagnostics(merged: Path) -> None:
    record = read_record(merged)
    numbers = gather(merged, record)
    assert numbers.alignment is not None
    assert numbers.alignment.names == ("A", "B", "C")
    assert set(numbers.kept["C"]) == {"model.layers.0.self_attn.q_proj"}
    module = "model.layers.0.self_attn.q_proj"
    assert sum(value > 0 for value in numbers.spectra["q_proj"]["merged"]) >= record["modules"][module]["merged_rank"]
    for sums in numbers.kept["A"].values():
        assert sums.kept <= sums.own * (1 + 1e-9)


def test_inputs_that_are_gone_or_changed_are_said_and_the_rest_is_drawn(merged: Path) -> None:
    shutil.rmtree("A")
    make_adapter(Path("B"), 6, seed=9, use_rslora=True)
    said = text(report_page(merged))
    assert "Not shown below, as it is missing: A cannot be read" in said
    assert "B has changed since the merge: adapter_model.safetensors" in said
    assert "How alike" not in said
    assert "Spectra" in said


def test_inputs_can_be_elsewhere(merged: Path) -> None:
    shutil.move("A", "moved")
    assert "How alike" in text(report_page(merged, inputs=["moved", "B", "C"]))
    with pytest.raises(ConfigError, match=r"2 are given for a merge of 3.*in this order: A, B, C"):
        report_page(merged, inputs=["moved", "B"])


def test_an_input_without_a_file_is_missing() -> None:
    assert read_inputs([{"name": "x", "source": None, "sha256": {}}], None) == ({}, ("x is not in a file",))


def test_weights_are_drawn_by_adapter_block_and_step(merged: Path) -> None:
    assert "Weights adapter weight A 0.5 B 2 C 1" in text(report_page(merge(Recipe(weights=[0.5, 2.0, 1.0]))))
    assert "Weights adapter weight A 0.5" in text(report_page(merge(Recipe(weights={"A": 0.5}))))
    module = "model.layers.0.self_attn.q_proj"
    table = {"A": {module: 0.25}, "B": {module: -0.5}, "C": {module: 1.0}}
    learned = Weights(
        table, {"objective": "match", "steps": 2}, ("A", "B"), torch.tensor([[1.0, 2.0], [0.5, 1.0]]), torch.rand(3, 3)
    )
    learned.save("w.safetensors")
    page = report_page(merge(Recipe(method="sum", weights=dict(learned))), weights="w.safetensors")
    assert "B, 0: -0.50" in text(page)
    for words in ("weights by block", "objective while learning", "mean weight while learning", "A, step 2: 0.5"):
        assert words in text(page)


def test_scores_are_drawn_with_their_units_intervals_and_worst_task(merged: Path) -> None:
    rows = [
        {"label": "no adapter", "mean": 0.5, "margin": 0.1, "raw": {"t": 0.4, "u": 1.0},
         "normalised": {"t": 0.5, "u": 0.25}, "intervals": {"t": [0.35, 0.47]}},
        {"label": "OUT", "mean": None, "margin": None, "raw": {"t": 0.7}, "normalised": {}},
    ]  # fmt: skip
    tasks = {"t": {"kind": "classification", "metric": "accuracy", "rows": 400}, "u": {"rows": None}}
    Path("s.json").write_text(json.dumps({"name": "set", "split": "test", "tasks": tasks, "rows": rows}))
    said = text(report_page(merged, scores="s.json"))
    assert "Scores set, test rows" in said
    assert "no adapter: 0.500 (0.400 to 0.600)" in said and "whiskers: its 95 % interval" in said
    assert "normalised as measured mean worst in task t accuracy, 400 rows u" in said
    assert "no adapter 0.500 ± 0.100 0.250 u 0.400 ± 0.060 1.000 OUT 0.700" in said


def test_scores_without_adapters_to_compare_with_are_a_table_alone(merged: Path) -> None:
    rows = [{"label": "OUT", "mean": None, "margin": None, "raw": {"t": 0.7}, "normalised": {}}]
    Path("s.json").write_text(json.dumps({"name": "set", "split": "test", "tasks": {"t": {}}, "rows": rows}))
    said = text(report_page(merged, scores="s.json"))
    assert "as measured t OUT 0.700" in said and "worst" not in said


def test_a_merged_model_has_a_report_too(merged: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.weight": torch.zeros(update.shape) for name, update in load("A").items()}
    Path("base").mkdir()
    save_file(tensors, "base/model.safetensors")
    Path("base/config.json").write_text("{}")
    page = report_page(merge(Recipe(), into="base"))
    assert "Merged model" in text(page)
    assert "Spectra" in text(page)


def test_names_from_files_are_only_text(merged: Path) -> None:
    record = json.loads((merged / FILE).read_text())
    record["notes"] = ["<script>alert(1)</script>"]
    record["inputs"][0]["source"] = "<img src=x onerror=alert(1)>"
    (merged / FILE).write_text(json.dumps(record))
    assert "<script>" not in report_page(merged)
    assert "<img" not in report_page(merged)


NASTY = "</script></style></svg><img src=//x onerror=a()>' \" \x1b[31m\u202e{{ 7 * 7 }}]]>-->"


def test_a_hostile_record_is_only_text_everywhere(merged: Path) -> None:
    record = json.loads((merged / FILE).read_text())
    for key in ("version", "dtype", "base_model", "made"):
        record[key] = NASTY
    record |= {"notes": [NASTY], "warnings": [NASTY], "command": [NASTY], "extras": {NASTY: NASTY}}
    record |= {"input_kept": {NASTY: 0.5}}
    module = f"layers.0.{NASTY.replace('.', '')}"
    record["fit"] = {"prior": NASTY, "modules": {module: {"prior": 1.0, "fitted": 2.0, "kept": True, "lost": 0.5}}}
    for entry in record["inputs"]:
        entry |= {"name": NASTY, "type": NASTY, "revision": NASTY}
    record["modules"] |= {module: next(iter(record["modules"].values()))}
    (merged / FILE).write_text(json.dumps(record))
    scores = {"name": NASTY, "split": NASTY, "tasks": [NASTY], "rows": [
        {"label": NASTY, "mean": 0.5, "margin": 0.1, "raw": {NASTY: 0.5}, "normalised": {NASTY: 0.5}}]}  # fmt: skip
    Path("scores.json").write_text(json.dumps(scores))
    page = report_page(merged, scores="scores.json")
    assert "img src=//x" in text(page) and "<img" not in page and "<script" not in page
    assert r"\x1b[31m\u202e{{ 7 * 7 }}" in text(page)
    assert all(line == "" or line.isprintable() for line in page.split("\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": None}, "inputs: not a whole record"),
        ({"inputs": [{"name": ["a"]}]}, r"inputs\.0\.name: not a whole record"),
        ({"recipe": {}}, r"recipe\.space: not a whole record"),
        ({"modules": {"x": {"norm": "1", "rank": 1, "input_norm": 1.0}}}, r"modules\.x\.norm: not a whole record"),
        ({"fit": {"prior": "iso", "modules": {"x": {}}}}, r"fit\.modules\.x\.prior: not a whole record"),
        ({"modules": {}}, "q_proj: the record beside it does not know this module"),
    ],
)
def test_a_record_that_lacks_something_is_refused(merged: Path, change: dict[str, Any], message: str) -> None:
    record = json.loads((merged / FILE).read_text()) | change
    (merged / FILE).write_text(json.dumps(record))
    with pytest.raises(SourceError, match=message):
        report_page(merged)


def test_half_a_character_is_kept_as_it_was(merged: Path) -> None:
    make_adapter(Path("A"), base_model_name_or_path="\ud83d", task_type="\ud83d")
    merge_files(["A"], "OUT", overwrite=True)
    assert read_record(merged)["base_model"] == "\ud83d"
    assert r"\ud83d" in text(report_page(merged))


def test_no_secret_is_kept_in_a_record(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a" * 34
    command = ["coremerge", "merge", "--token", "my-own-word", f"https://me:{token}@host"]
    merge_files(["A", "B"], "OUT", overwrite=True, command=command)
    kept = "".join(path.read_text(errors="replace") for path in merged.iterdir())
    assert token not in kept and "my-own-word" not in kept
    assert read_record(merged)["command"] == ["coremerge", "merge", "--token", "***", "https://***@host"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}'])
def test_what_is_no_merge_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(SourceError, match=r"coremerge\.json: cannot be read.*coremerge merge wrote"):
        report_page(tmp_path)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(SourceError, match="not a record of a merge"):
        report_page(tmp_path)


def test_what_are_no_scores_is_refused(merged: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        report_page(merged, scores="none.json")
    Path("s.json").write_text("[1]")
    with pytest.raises(SourceError, match="coremerge evaluate --json"):
        report_page(merged, scores="s.json")


def test_places_are_blocks_and_short_kinds() -> None:
    names = ["h.0.attn.proj", "h.0.mlp.proj", "h.1.attn.q", "head"]
    assert {name: (p.layer, p.kind) for name, p in places_of(names).items()} == {
        "h.0.attn.proj": (0, "attn.proj"), "h.0.mlp.proj": (0, "mlp.proj"), "h.1.attn.q": (1, "q"),
        "head": (None, "head"),
    }  # fmt: skip


def test_stacks_of_blocks_share_no_place() -> None:
    t5 = [f"{stack}.block.0.layer.0.SelfAttention.q" for stack in ("encoder", "decoder")]
    assert [place.stack for place in places_of(t5).values()] == ["encoder", "decoder"]
    llava = ["model.language_model.layers.0.q_proj", "model.vision_tower.encoder.layers.0.q_proj", "model.head.linear"]
    assert [(p.stack, p.layer, p.label) for p in places_of(llava).values()] == [
        ("language_model", 0, "language_model q_proj"), ("vision_tower", 0, "vision_tower q_proj"),
        ("", None, "linear"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stacks", "short"),
    [
        (["a", "a.b"], ["a", "b"]),
        (["a.x", "b.x", "b.y"], ["a", "b.x", "y"]),
        (["a", "b", "b.a"], ["a", "b", "b.a"]),
        (["x.a", "x.a.c", "y.b"], ["x.a", "c", "y"]),
    ],
)
def test_stacks_are_told_apart(stacks: list[str], short: list[str]) -> None:
    assert [place.stack for place in places_of([f"{stack}.0.q" for stack in stacks]).values()] == short


def test_spectra_are_means_over_blocks() -> None:
    from coremerge import Adapter
    from coremerge.report.gather import _spectra

    def one(value: float, rank: int) -> LowRank:
        return LowRank(value * torch.eye(4)[:, :rank], torch.eye(4)[:rank])

    held = {"a": Adapter.from_updates({"x.0.q": one(1.0, 2), "x.1.q": one(3.0, 1)})}
    found = _spectra(held, places_of(["x.0.q", "x.1.q"]), 1, lambda done, count: None)
    assert found == {"q": {"a": pytest.approx([2.0, 0.5])}}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_network_and_without_complaint(merged: Path, scheme: Any) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    Path("r.html").write_text(report_page(merged), encoding="utf-8")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_context(
            color_scheme=scheme, offline=True, viewport={"width": 1100, "height": 800}
        ).new_page()
        complaints: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(Path("r.html").resolve().as_uri())
        drawn = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().height)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert (complaints, len(asked)) == ([], 1)
    assert len(drawn) >= 6 and min(drawn) > 40
    assert wide <= 1100
    assert (background == "rgb(253, 253, 252)") == (scheme == "light")
