"""The papers' tables on stand-ins: adapters, data and bases of the same layout, in folders instead of on the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, LlamaConfig, LlamaForCausalLM

from coremerge import Recipe, load, merge
from coremerge.evaluation import read_taskset
from coremerge.evaluation.evaluate import evaluate
from coremerge.evaluation.plan import read_plan
from families import make_adapter as family_adapter
from families import make_model
from made import clip_pictures, make_llava, make_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
import reproduce  # noqa: E402

SETS = sorted(path.stem for path in RECIPES.glob("*.yaml"))
WIDTH = 16


def adapter(folder: Path, modules: list[str], width: int, rank: int = 4, extras: dict[str, Any] | None = None) -> None:
    """As the published ones: a pickle of float32 factors, no scale to speak of."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder.name))
    tensors = dict(extras or {})
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(width, rank, generator=generator)
    torch.save(tensors, folder / "adapter_model.bin")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    config |= {"task_type": "SEQ_CLS"} if extras else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def attention(layers: int, prefix: str = "", parts: str = "q k v out") -> list[str]:
    return [f"{prefix}layers.{i}.self_attn.{part}_proj" for i in range(layers) for part in parts.split()]


def save(
    rows: dict[str, list[Any]], split: str, folder: Path, tuning: dict[str, list[Any]] | None = None, **features: Any
) -> None:
    made = datasets.Dataset.from_dict(rows)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    more = {"validation": datasets.Dataset.from_dict(tuning)} if tuning else {}
    datasets.DatasetDict({split: made, **more}).save_to_disk(folder)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (20 * i, 99, 7 * i)) for i in range(count)]


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """Eight adapters whose keys begin at the vision tower's encoder, and a CLIP of two towers."""
    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 50, "max_position_embeddings": 64, "eos_token_id": 2},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    mirror, made = tmp_path / "mirror", reproduce.read_set("knots-vit-b-32")
    CLIPModel(config).save_pretrained(mirror / made.base)
    CLIPProcessor(clip_pictures(), make_tokenizer("encoder")).save_pretrained(mirror / made.base)
    for source in made.tasks.values():
        adapter(mirror / source.adapter, attention(2, "encoder."), WIDTH)
        label = datasets.ClassLabel(names=["a_b", "c", "d"])
        rows = {"image": pictures(10), "label": [i % 3 for i in range(10)]}
        save(rows, source.split, mirror / source.data, label=label)
    return mirror


def test_the_vision_table(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    reproduce.main(["knots-vit-b-32", str(out), "--mirror", str(vision), "--rows", "5", "--only-prepare"])
    assert f"coremerge search --tasks {out} --device" in capsys.readouterr().out
    tasks = read_taskset(out)
    assert list(tasks.tasks) == list(reproduce.read_set("knots-vit-b-32").tasks)
    assert [len(tasks.rows("dtd", split)) for split in ("validation", "test")] == [1, 4]
    assert dict(tasks.joint) == {"all": tuple(tasks.tasks)}
    merged = merge([load(path) for path in tasks.own().values()], Recipe())
    merged.adapter.save(tmp_path / "merged")
    result = evaluate([str(tmp_path / "merged")], out, split="test")
    assert {row.label for row in result.rows} >= {"no adapter", "merged"}
    assert all(0 <= score <= 1 for row in result.rows for score in row.scores.raw.values())
    with torch.no_grad():
        found = load(out / "adapters" / "dtd")["encoder.layers.0.self_attn.q_proj"].dense()
        tensors = torch.load(vision / reproduce.read_set("knots-vit-b-32").tasks["dtd"].adapter / "adapter_model.bin")
    stem = "base_model.model.encoder.layers.0.self_attn.q_proj.lora_"
    torch.testing.assert_close(found.float(), tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"])


def test_the_joint_table_is_a_search_for_the_group_of_all(tmp_path: Path) -> None:
    made, hub = reproduce.read_set("knots-vit-b-32"), reproduce.Hub()
    (plain,), (joint,) = (reproduce.commands(made, tmp_path, hub, "cpu", joint=joint) for joint in (False, True))
    assert joint[-2:] == ["--target", reproduce.JOINT] and "--target" not in plain
    assert joint[joint.index("-o") + 1] != plain[plain.index("-o") + 1]


def test_labels_that_cannot_be_joined_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["knots-llama-3-8b", str(tmp_path / "out"), "--joint"])
    assert "--joint: the labels of these tasks cannot be joined" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_head_ranks_classes_as_clip_does(vision: Path) -> None:
    name = str(vision / "openai" / "clip-vit-base-patch32")
    model, processor = CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
    head = reproduce.Captions(name).head(["w1", "w2_w3", "w4"], ("a photo of a {}.",))["weight"]
    inputs = processor(
        text=[f"a photo of a {x}." for x in ("w1", "w2 w3", "w4")],
        images=pictures(3),
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        said = model(**inputs).logits_per_image / model.logit_scale.exp()
        pooled = model.vision_model(inputs["pixel_values"]).pooler_output
        norms = (pooled @ model.visual_projection.weight.T).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pooled @ head.T / norms, said)


@pytest.mark.parametrize(("name", "layers", "width"), [("knots-vit-b-32", 12, 768), ("knots-vit-l-14", 24, 1024)])
def test_the_true_shapes_merge(tmp_path: Path, name: str, layers: int, width: int) -> None:
    sources = list(reproduce.read_set(name).tasks.values())[:2]
    for source in sources:
        adapter(tmp_path / source.adapter, attention(layers, "encoder."), width, rank=16)
    # the sizes of the published files, 4.75 and 12.7 MB
    assert (tmp_path / sources[0].adapter / "adapter_model.bin").stat().st_size // 10**5 in (47, 126, 127)
    result = merge([load(tmp_path / source.adapter, allow_pickle=True) for source in sources], Recipe())
    assert len(result.adapter) == 4 * layers


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six adapters for sequence classification, and a Llama."""
    torch.manual_seed(0)
    mirror, made = tmp_path / "mirror", reproduce.read_set("knots-llama-3-8b")
    config = LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(mirror / made.base)
    make_tokenizer().save_pretrained(mirror / made.base)
    texts = {"text": [f"w{i} w2" for i in range(9)], "pair": [f"w{i}" for i in range(9)]}
    for source in made.tasks.values():
        head = {"base_model.model.score.weight": torch.arange(3.0)[:, None] * torch.ones(3, WIDTH)}
        adapter(mirror / source.adapter, attention(2, "model.", "q k v o"), WIDTH, extras=head)
        values = list(source.labels or range(2 if source.head_rows else 3))
        labels = [values[i % len(values)] for i in range(9)]
        labels[3] = -1 if isinstance(values[0], int) else "-"
        rows = {source.columns[key]: column for key, column in texts.items()} | {source.columns["label"]: labels}
        tuning = {key: column[:6] for key, column in rows.items()} if source.tuning else None
        save(rows, source.split, mirror / source.data, tuning)
    return mirror


def test_the_nli_table(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = reproduce.read_set("knots-llama-3-8b")
    tasks = {name: made.tasks[name] for name in ("snli", "sick", "scitail")}
    reproduce.prepare(made.model_copy(update={"tasks": tasks}), out, reproduce.Hub(pairs), None)
    read = read_taskset(out)
    rows = read.rows("snli", "test")
    assert (len(rows), {row.label for row in rows}) == (8, {0, 1, 2})  # all of the split; one has no label
    assert [len(read.rows(name, "validation")) for name in tasks] == [5, 5, 5]
    assert not read.joint
    assert load_file(out / "heads" / "scitail.safetensors")["weight"][:, 0].tolist() == [0, 1]
    result = evaluate([], out, split="test")
    assert "no adapter" in [row.label for row in result.rows]


@pytest.mark.parametrize(("task", "count", "test"), [("mnli", 9815, 7852), ("qnli", 5463, 4370), ("rte", 277, 138)])
def test_the_nli_splits_have_the_released_counts(tmp_path: Path, task: str, count: int, test: int) -> None:
    source = reproduce.read_set("knots-llama-3-8b").tasks[task]
    row = {column: 0 if key == "label" else "w1" for key, column in source.columns.items()}
    found = reproduce.splits([row] * count, source, reproduce.Hub(), tmp_path, None)
    assert (len(found["test"]), len(found["validation"])) == (test, count - test)


def test_the_nli_plan_has_every_row_of_the_paper() -> None:
    labels = {merge.label for merge in read_plan(RECIPES / "plans" / "nli.yaml").merges}
    spaces = {f"{space} {method}" for space in ("full", "knots", "core") for method in ("ties", "dare_ties")}
    spectral = {"core task arithmetic", "core tsv", "core sum + isotropize", "full tsv as published"}
    assert labels >= spaces | spectral | {"full Iso-C as published + isotropize:span=false"}


@pytest.mark.slow
def test_nli_weights_are_learned_merged_and_scored(pairs: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out", reproduce.read_set("knots-llama-3-8b")
    tasks = {name: made.tasks[name] for name in ("snli", "rte")}
    few = made.model_copy(
        update={
            "tasks": tasks,
            "learn": ("--preset", "language", "--modules", "all", "--steps", "2", "--batch", "1"),
            "dtype": None,
        }
    )
    hub = reproduce.Hub(pairs)
    reproduce.prepare(few, out, hub, None)
    search, *rest = reproduce.commands(few, out, hub, "cpu")
    assert (search[0], [words[0] for words in rest]) == ("search", ["learn-weights", "merge", "evaluate"])
    reproduce.run(rest)
    assert load(out / "merged").modules.keys() == load(out / "adapters" / "rte").modules.keys()


def test_rows_of_a_head_that_is_masked() -> None:
    assert reproduce.read_set("knots-llama-3-8b").tasks["rte"].head_rows == (0, 2)


@pytest.mark.slow
def test_generation_learns_and_merges(tmp_path: Path) -> None:
    mirror, out = tmp_path / "mirror", tmp_path / "out"
    made = reproduce.read_set("nsc-llava-1.5-7b")
    make_model("llava").save_pretrained(mirror / made.base)
    make_llava().save_pretrained(mirror / made.base)
    tasks = dict(list(made.tasks.items())[:2])
    for i, source in enumerate(tasks.values()):
        family_adapter("llava", mirror / source.adapter, seed=i)
        save({"image": pictures(3), "question": [f"w{j}" for j in range(3)]}, source.split, mirror / source.data)
    few = made.model_copy(update={"tasks": tasks, "learn": ("--preset", "language", "--steps", "2", "--inputs", "2")})
    hub = reproduce.Hub(mirror)
    reproduce.prepare(few, out, hub, 3)
    reproduce.run(reproduce.commands(few, out, hub, "cpu"))
    assert load(out / "merged").modules.keys() == load(mirror / tasks["IconQA"].adapter).modules.keys()


@pytest.mark.parametrize("name", SETS)
def test_every_set_and_plan_means_something(name: str) -> None:
    made = reproduce.read_set(name)
    assert all("label" in source.columns for source in made.tasks.values()) == (made.kind != "generation")
    if made.plan:
        assert len(read_plan(RECIPES / made.plan).merges) > 5
    for source in made.tasks.values():
        assert len(source.head_rows) in (0, len(source.classes))


def test_an_adapter_without_a_head(tmp_path: Path) -> None:
    adapter(tmp_path / "org" / "a", attention(1), 8)
    source = reproduce.Source(adapter="org/a", data="x", columns={})
    with pytest.raises(SystemExit, match="org/a has no head"):
        reproduce.own_head(load(tmp_path / "org" / "a", allow_pickle=True), source)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)clip-vit-base-patch32.*--mirror FOLDER"):
        reproduce.main(["knots-vit-b-32", str(tmp_path / "out"), "--mirror", str(tmp_path)])
