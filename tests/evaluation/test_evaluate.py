"""Any adapters or models on any task set."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from coremerge import Adapter, LowRank, load
from coremerge.errors import ConfigError, InputError, MismatchError
from coremerge.evaluation import Evaluator, evaluate, read_taskset
from coremerge.evaluation.evaluate import NONE, OWN
from coremerge.pipeline import merge_files
from families import make_adapter, make_model
from made import clip_pictures, jsonl, picture
from posted import Posted
from tolerances import SCORE, SINGLE

MODULE = "encoder.layer.0.attention.self.query"


def change(folder: Path, **values: Any) -> Path:
    """The task set with other values at its top."""
    file = folder / "tasks.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))
    return folder


def test_adapters_stand_beside_none_and_each_tasks_own(folder: Path, tmp_path: Path) -> None:
    merge_files([folder / "colour", folder / "length"], tmp_path / "merged")
    result = evaluate([folder / "colour", tmp_path / "merged"], folder)
    assert [row.label for row in result.rows] == [OWN, NONE, "colour", "merged"]
    assert result[OWN].scores.mean == 1.0
    assert result["colour"].scores.raw["colour"] == result[OWN].scores.raw["colour"]
    assert result.counts == {"colour": 12, "length": 12}
    for row in result.rows:
        for task, (low, high) in row.scores.intervals.items():
            assert low <= row.scores.raw[task] <= high
    json.dumps(result.to_dict(), allow_nan=False)


def test_other_processes_score_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = evaluate([folder / "colour", folder / "length"], folder)
    monkeypatch.chdir(folder)
    there = evaluate(["colour", "./length"], ".", executor=Posted())
    assert [row.source for row in there.rows] == [None, None, "colour", "./length"]
    for one, other in zip(here.rows, there.rows, strict=True):
        assert (one.label, one.scores) == (other.label, other.scores)


def test_a_merged_model_scores_as_the_adapter_that_went_into_it(folder: Path, tmp_path: Path) -> None:
    sources = [folder / "colour", folder / "length"]
    merge_files(sources, tmp_path / "adapter")
    merge_files(sources, tmp_path / "model", into=folder / "base")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if not (tmp_path / "model" / file).exists():
            shutil.copy(folder / "base" / file, tmp_path / "model")
    result = evaluate([tmp_path / "model", tmp_path / "adapter"], folder)
    adapter, model = result["adapter"].scores, result["model"].scores
    assert model.raw == pytest.approx(adapter.raw, abs=SCORE)
    assert model.normalised == pytest.approx(adapter.normalised, abs=SCORE)


def test_a_task_without_an_adapter_of_its_own_has_no_share(own_folder: Path) -> None:
    tasks = yaml.safe_load((own_folder / "tasks.yaml").read_text())["tasks"]
    for task in tasks.values():
        del task["adapter"]
    result = evaluate([own_folder / "colour"], change(own_folder, tasks=tasks))
    assert [row.label for row in result.rows] == [NONE, "colour"]
    scores = result["colour"].scores
    assert (dict(scores.normalised), scores.worst) == ({}, None)
    assert math.isnan(scores.mean)
    assert scores.to_dict()["mean"] is None


def test_an_error_is_normalised_the_other_way_round(own_folder: Path) -> None:
    tasks = yaml.safe_load((own_folder / "tasks.yaml").read_text())["tasks"]
    tasks["length"]["metric"] = "rmse"
    result = evaluate([own_folder / "colour"], change(own_folder, tasks=tasks))
    raw, own = (result[label].scores.raw["length"] for label in ("colour", OWN))
    assert result["colour"].scores.normalised["length"] == pytest.approx(own / raw)


def test_where_the_task_is_unknown_the_largest_output_of_all_heads_counts(own_folder: Path) -> None:
    tasks = yaml.safe_load((own_folder / "tasks.yaml").read_text())["tasks"]
    tasks["other"] = tasks["colour"] | {"classes": ["yes", "maybe"], "head": "other.safetensors"}
    rows = [json.loads(line) for line in (own_folder / "colour.test.jsonl").read_text().splitlines()]
    jsonl(own_folder / "other.jsonl", *(row | {"label": "maybe"} for row in rows))
    tasks["other"]["test"] = "other.jsonl"
    save_file({"weight": torch.randn(2, 16), "bias": torch.randn(2)}, own_folder / "other.safetensors")
    change(own_folder, tasks=tasks, joint={"both": ["colour", "other"]})
    evaluator = Evaluator(read_taskset(own_folder), {})
    encoder = evaluator.encoder
    features = encoder.features(encoder.batches(read_taskset(own_folder).rows("colour", "test")))
    heads = [load_file(own_folder / name) for name in ("colour/head.safetensors", "other.safetensors")]
    no_yes, yes_maybe = (features @ head["weight"].T + head["bias"] for head in heads)
    union = torch.stack([no_yes[:, 0], no_yes[:, 1].maximum(yes_maybe[:, 0]), yes_maybe[:, 1]], 1).argmax(1).numpy()
    labels = np.array([["no", "yes"].index(row["label"]) for row in rows])
    expected = np.concatenate([union == labels, union == 2]).mean()
    assert evaluator.score({}, "test").joint == {"both": pytest.approx(expected)}


@pytest.mark.parametrize("pooling", ["first", "last", "pooler"])
def test_features_are_pooled_as_the_task_set_says(own_folder: Path, pooling: str) -> None:
    taskset = read_taskset(change(own_folder, pooling=pooling))
    encoder = Evaluator(taskset, {}).encoder
    rows = taskset.rows("colour", "test")
    features = encoder.features(encoder.batches(rows))
    for row, feature in zip(rows, features, strict=True):
        output = encoder.model(**encoder.processor(row.example.text, return_tensors="pt"))
        hidden = output.last_hidden_state[0]
        expected = {"first": hidden[0], "last": hidden[-1], "pooler": output.pooler_output[0]}[pooling]
        torch.testing.assert_close(feature, expected, atol=SINGLE, rtol=SINGLE)


def test_biases_and_whole_tensors_of_an_adapter_count(own_folder: Path) -> None:
    encoder = Evaluator(read_taskset(own_folder), {}).encoder
    norm, bias = torch.full((16,), 2.0), torch.full((16,), 0.5)
    adapter = Adapter.from_updates(
        {MODULE: LowRank(torch.zeros(16, 1), torch.zeros(1, 16))},
        biases={MODULE: bias},
        extras={"embeddings.LayerNorm.weight": norm, "classifier.weight": torch.ones(2, 16)},
    )
    before = {name: value.clone() for name, value in encoder.model.named_parameters()}
    with encoder.carrying(adapter, 2.0):
        now = dict(encoder.model.named_parameters())
        torch.testing.assert_close(now[f"{MODULE}.bias"], before[f"{MODULE}.bias"] + 1.0)
        assert torch.equal(now["embeddings.LayerNorm.weight"], norm)
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.named_parameters())
    assert encoder.left_out(adapter) == ["classifier.weight"]


def test_another_base_can_be_named(own_folder: Path) -> None:
    expected = evaluate([own_folder / "colour"], own_folder)["colour"].scores
    change(own_folder, base=None)
    with pytest.raises(ConfigError, match="--base MODEL"):
        evaluate([own_folder / "colour"], own_folder)
    assert evaluate([own_folder / "colour"], own_folder, base=own_folder / "base")["colour"].scores == expected


def test_some_tasks_and_the_first_rows(folder: Path) -> None:
    result = evaluate([folder / "colour"], folder, only=["length"], limit=5, split="validation")
    assert dict(result.counts) == {"length": 5}
    with pytest.raises(ConfigError, match=r"no such task.*colour, length"):
        evaluate([folder / "colour"], folder, only=["size"])
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate([folder / "colour"], folder, limit=0)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    make_adapter("llama", tmp_path / "llama", 1)
    with pytest.raises(MismatchError, match="no such module"):
        evaluate([tmp_path / "llama"], folder)


def test_nothing_to_evaluate_is_refused(own_folder: Path) -> None:
    tasks = yaml.safe_load((own_folder / "tasks.yaml").read_text())["tasks"]
    for task in tasks.values():
        del task["adapter"]
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate([], change(own_folder, tasks=tasks))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vision encoder: whether a picture is dark, and each of its 2 × 2 patches."""
    folder = tmp_path_factory.mktemp("pictures")
    make_model("clip").save_pretrained(folder / "base")
    clip_pictures().save_pretrained(folder / "base")
    make_adapter("clip", folder / "adapter", 1)
    shades = {picture(folder / f"{shade}.png", shade).name: shade for shade in (0, 60, 120, 180, 240, 255)}
    jsonl(folder / "whole.jsonl", *({"image": n, "label": "light" if s > 130 else "dark"} for n, s in shades.items()))
    jsonl(folder / "patches.jsonl", *({"image": n, "label": ["a", "b", "a", "b"]} for n in shades))
    jsonl(folder / "depth.jsonl", *({"image": n, "label": [1.0, 2.0, 3.0, s / 60]} for n, s in shades.items()))
    torch.manual_seed(0)
    for name, outputs in (("two", 2), ("one", 1)):
        save_file({"weight": torch.randn(outputs, 16), "bias": torch.zeros(outputs)}, folder / f"{name}.safetensors")
    two = {"kind": "classification", "head": "two.safetensors", "adapter": "adapter"}
    tasks = {
        "shade": two | {"metric": "accuracy", "classes": ["dark", "light"], "test": "whole.jsonl"},
        "patch": two | {"metric": "miou", "per": "patch", "classes": ["a", "b"], "test": "patches.jsonl"},
        "all patches": two | {"metric": "exact_match", "per": "patch", "classes": ["a", "b"], "test": "patches.jsonl"},
        "depth": {
            "kind": "regression", "metric": "rmse", "per": "patch", "head": "one.safetensors", "test": "depth.jsonl",
        },
    }  # fmt: skip
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"name": "v", "base": {"path": "base"}, "tasks": tasks}))
    return folder


def test_pictures_are_scored_whole_and_patch_by_patch(pictures: Path) -> None:
    result = evaluate([pictures / "adapter"], pictures)
    evaluator = Evaluator(read_taskset(pictures), {})
    encoder, taskset = evaluator.encoder, evaluator.taskset
    with encoder.carrying(load(pictures / "adapter")):
        (places, batch), *_ = encoder.batches(taskset.rows("depth", "test"))
        patches = encoder.model(**batch).last_hidden_state[:, 1:][places.argsort()]
    head = load_file(pictures / "one.safetensors")
    guesses = (patches @ head["weight"].T)[..., 0]
    labels = torch.tensor([row.label for row in taskset.rows("depth", "test")])
    scores = result["adapter"].scores
    assert scores.raw["depth"] == pytest.approx((guesses - labels).square().mean().sqrt().item(), rel=SINGLE)
    right = (patches @ load_file(pictures / "two.safetensors")["weight"].T).argmax(-1) == torch.tensor([0, 1, 0, 1])
    assert scores.raw["all patches"] == pytest.approx(right.all(1).double().mean().item())
    assert set(scores.raw) == {"shade", "patch", "all patches", "depth"}
    assert set(scores.normalised) <= {"shade", "patch", "all patches"}


def test_too_many_labels_for_the_patches_are_refused(pictures: Path) -> None:
    rows = [json.loads(line) for line in (pictures / "patches.jsonl").read_text().splitlines()]
    tasks = read_taskset(pictures)
    for count, message in ((9, "9 labels a row for 4 patches"), (3, "different numbers of patches")):
        changed = [row | {"label": ["a"] * (count if count == 9 or i else 4)} for i, row in enumerate(rows)]
        jsonl(pictures / "wrong.jsonl", *changed)
        wrong = tasks.model_copy(
            update={"tasks": {"patch": tasks.tasks["patch"].model_copy(update={"test": "wrong.jsonl"})}}
        )
        with pytest.raises(ConfigError, match=message):
            evaluate([pictures / "adapter"], wrong)
