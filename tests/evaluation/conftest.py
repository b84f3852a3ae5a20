"""A task set small enough to be made on the fly: a two-layer encoder, two adapters, a dozen rows each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

torch.set_num_threads(1)

WIDTH = 16
MODULES = [f"encoder.layer.{layer}.attention.self.{part}" for layer in (0, 1) for part in ("query", "value")]
WORDS = ["red", "green", "blue", "cat", "dog", "tree"]
TASKS: dict[str, dict[str, Any]] = {
    "colour": {"kind": "classification", "metric": "accuracy", "classes": ["no", "yes"]},
    "length": {"kind": "regression", "metric": "pearson"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete task set; tests must not change it."""
    return make_taskset(tmp_path_factory.mktemp("taskset"))


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A complete task set to break."""
    return make_taskset(tmp_path)


def make_taskset(folder: Path) -> Path:
    torch.manual_seed(0)
    make_base(folder / "base")
    for name, task in TASKS.items():
        make_adapter(folder / name)
        outputs = len(task.get("classes", [0]))
        save_file(
            {"weight": torch.randn(outputs, WIDTH), "bias": torch.randn(outputs)}, folder / name / "head.safetensors"
        )
        for split in ("validation", "test"):
            write_rows(folder / f"{name}.{split}.jsonl", name, split)
    (folder / "tasks.yaml").write_text(yaml.safe_dump(description(folder)), encoding="utf-8")
    return folder


def description(folder: Path) -> dict[str, Any]:
    tasks = {
        name: {
            "description": name,
            **task,
            "adapter": name,
            "head": f"{name}/head.safetensors",
            "validation": f"{name}.validation.jsonl",
            "test": f"{name}.test.jsonl",
        }
        for name, task in TASKS.items()
    }
    return {"name": "tiny", "base": {"hub_id": str(folder / "base")}, "max_length": 12, "tasks": tasks}


def make_base(folder: Path) -> None:
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)


def make_adapter(folder: Path, r: int = 2) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["query", "value"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for module in MODULES:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, WIDTH)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(WIDTH, r)
    save_file(tensors, folder / "adapter_model.safetensors")


def write_rows(path: Path, task: str, split: str) -> None:
    rows = []
    for i in range(12):
        words = [WORDS[(i * k + len(split)) % len(WORDS)] for k in range(1, 2 + i % 5)]
        label = float(len(words)) if task == "length" else ("yes" if i % 3 else "no")
        rows.append({"text": " ".join(words), "label": label} | ({"pair": "cat"} if task == "length" else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
