"""Trains every adapter of a set: python train.py [--set FOLDER] [--only TASK] [--wordnet DIR] [--data-only].

About five minutes a task on two cores. Writes data/ and adapters/ of the set and nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import more_tasks
import tasks
import torch
from card import write_card
from encoder import Encoder, Rows
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import Maker, Splits, cut
from torch import Tensor, nn
from wordnet import WordNet

from coremerge.evaluation import TaskSet, read_taskset

sys.path.append(str(Path(__file__).parents[1]))  # what all examples do alike
from trained import save_adapter

HERE = Path(__file__).parent
TARGETS = ["query", "key", "value", "attention.output.dense"]
EPOCHS, BATCH, WARMUP, HEAD_RATE, SEED = 2, 64, 20, 3e-3, 0


@dataclass(frozen=True)
class Setting:
    """How one task's adapter is made."""

    config: LoraConfig | VeraConfig
    learning_rate: float


def lora(r: int, alpha: int, learning_rate: float, rslora: bool = False) -> Setting:
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=TARGETS,
        lora_dropout=0.05,
        task_type="FEATURE_EXTRACTION",
    )
    return Setting(config, learning_rate)


def vera(r: int, learning_rate: float) -> Setting:
    config = VeraConfig(
        r=r, target_modules=TARGETS, vera_dropout=0.0, save_projection=True, task_type="FEATURE_EXTRACTION"
    )
    return Setting(config, learning_rate)


@dataclass(frozen=True)
class Set:
    """What a set's tasks and adapters are made by."""

    tasks: tuple[Maker, ...]
    settings: dict[str, Setting]


SETTINGS = {
    "noun_topic": lora(16, 32, 6e-4),
    "verb_topic": lora(32, 48, 6e-4),
    "part_of_speech": vera(32, 1e-2),
    "depth": lora(8, 16, 8e-4),
    "word_fits_gloss": lora(32, 64, 6e-4),
    "is_a": lora(32, 16, 5e-4, rslora=True),
    "polysemy": lora(8, 32, 6e-4),
    "relation": lora(16, 24, 8e-4),
}
SETS = {
    "minilm-wordnet": Set(tasks.TASKS, SETTINGS),
    "minilm-wordnet-16": Set(more_tasks.TASKS, {make.__name__: lora(16, 32, 6e-4) for make in more_tasks.TASKS}),
}
"""By the name of the folder beside this one."""


class Targets:
    """A task's labels as numbers: class indices, or standardised values to train on."""

    def __init__(self, splits: Splits) -> None:
        labels = [example.label for example in splits["train"]]
        self.classes = sorted({str(label) for label in labels}) if isinstance(labels[0], str) else None
        numbers = torch.tensor([-1.0, 1.0] if self.classes else [float(label) for label in labels])
        self.mean, self.std = numbers.mean(), numbers.std(correction=0)

    @property
    def outputs(self) -> int:
        return len(self.classes) if self.classes else 1

    def encode(self, labels: list[str | float]) -> Tensor:
        if self.classes:
            return torch.tensor([self.classes.index(str(label)) for label in labels])
        return (torch.tensor([float(label) for label in labels]) - self.mean) / self.std

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes:
            return nn.functional.cross_entropy(outputs, targets)
        return nn.functional.mse_loss(outputs[:, 0], targets)

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """Accuracy, or Pearson's correlation."""
        if self.classes:
            return float((outputs.argmax(-1) == targets).double().mean())
        return float(torch.corrcoef(torch.stack([outputs[:, 0], targets]).double())[0, 1])

    def in_units(self, head: nn.Linear) -> dict[str, Tensor]:
        """The head's tensors so that a regression answers in the label's own units."""
        weight, bias = head.weight.detach(), head.bias.detach()
        return {"weight": weight * self.std, "bias": bias * self.std + self.mean}


def shuffled_batches(lengths: list[int], epoch: int) -> Iterator[list[int]]:
    """Random batches of similar lengths: sorted within shuffled chunks of 16 batches."""
    rng = random.Random(epoch)
    order = rng.sample(range(len(lengths)), len(lengths))
    chunks = [sorted(order[i : i + 16 * BATCH], key=lengths.__getitem__) for i in range(0, len(order), 16 * BATCH)]
    batches = [chunk[i : i + BATCH] for chunk in chunks for i in range(0, len(chunk), BATCH)]
    rng.shuffle(batches)
    yield from batches


@dataclass(frozen=True)
class Split:
    """One split, tokenised and with its labels as numbers."""

    rows: Rows
    targets: Tensor


def fit(
    encoder: Encoder,
    model: nn.Module,
    head: nn.Linear,
    split: Split,
    labels: Targets,
    *,
    rate: float,
    watch: Callable[[int], bool] | None = None,
) -> None:
    """Two epochs of AdamW, learning rates warmed up and then falling to zero.

    ``watch`` is given the number of steps done, 0 first, and says whether to go on.
    """
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": own, "lr": rate}, {"params": head.parameters(), "lr": HEAD_RATE}])
    batches = [batch for epoch in range(EPOCHS) for batch in shuffled_batches(split.rows.lengths, epoch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / len(batches))
    )
    model.train()
    for done, batch in enumerate(batches):
        if watch and not watch(done):
            return
        loss = labels.loss(head(encoder.features(model, split.rows, batch)), split.targets[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if watch:
        watch(len(batches))


def measure(encoder: Encoder, folder: Path, split: Split, labels: Targets) -> dict[str, float | int]:
    """Scores the stored adapter, and the base model without it, under the stored head."""
    model, head = PeftModel.from_pretrained(encoder.fresh(), folder), load_head(folder)
    own = head(encoder.all_features(model, split.rows))
    with model.disable_adapter():
        without = head(encoder.all_features(model, split.rows))
    return {
        "rows": len(split.targets),
        "own": round(labels.score(own, split.targets), 4),
        "no_adapter": round(labels.score(without, split.targets), 4),
    }


def train(name: str, splits: Splits, encoder: Encoder, taskset: TaskSet) -> None:
    """Trains one task's adapter and head, writes both in half precision, and scores what was written."""
    torch.manual_seed(SEED)
    labels, setting = Targets(splits), SETS[taskset.folder.name].settings[name]
    folder, base = taskset.folder / "adapters" / name, taskset.base.hub_id
    data = {
        split: Split(encoder.rows([(e.text, e.pair) for e in examples]), labels.encode([e.label for e in examples]))
        for split, examples in splits.items()
    }
    model = get_peft_model(encoder.fresh(), setting.config)
    head = nn.Linear(encoder.width, labels.outputs)
    start = time.perf_counter()
    fit(encoder, model, head, data["train"], labels, rate=setting.learning_rate)
    seconds = time.perf_counter() - start
    save(model, labels.in_units(head), folder, base)
    scores: dict[str, Any] = {"metric": "accuracy" if labels.classes else "pearson"}
    scores |= {split: measure(encoder, folder, data[split], labels) for split in ("validation", "test")}
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    description = taskset.tasks[name].description
    write_card(folder, base, description, described(setting, len(splits["train"])), scores)
    print(f"{name}: {seconds:.0f} s, {json.dumps(scores)}", flush=True)


def described(setting: Setting, examples: int) -> dict[str, Any]:
    """The training settings as the card lists them."""
    config = setting.config
    adapter: dict[str, Any] = {"type": "LoRA" if isinstance(config, LoraConfig) else "VeRA", "r": config.r}
    if isinstance(config, LoraConfig):
        adapter |= {
            "alpha": config.lora_alpha,
            "rank-stabilised scale": config.use_rslora,
            "dropout": config.lora_dropout,
        }
    return adapter | {
        "modules": ", ".join(TARGETS),
        "examples": f"{examples:,}",
        "epochs": EPOCHS,
        "batch": BATCH,
        "optimiser": "AdamW, 20 warm-up steps, then linear to zero",
        "learning rate": f"{setting.learning_rate:g} (head {HEAD_RATE:g})",
    }


def save(model: PeftModel, head: dict[str, Tensor], folder: Path, base: str) -> None:
    """Writes PEFT's own files and the head, all tensors in half precision."""
    save_adapter(model, folder, base)
    save_file({key: value.half().contiguous() for key, value in head.items()}, folder / "head.safetensors")


def load_head(folder: Path) -> nn.Linear:
    tensors = load_file(folder / "head.safetensors")
    head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0]).requires_grad_(False)
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def write_data(folder: Path, name: str, splits: Splits) -> None:
    """Writes the validation and test rows, one JSON object a line."""
    (folder / "data").mkdir(exist_ok=True)
    for split in ("validation", "test"):
        rows = [{k: v for k, v in example._asdict().items() if v is not None} for example in splits[split]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "data" / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", type=Path, default=HERE, help="folder of the set: this one, or one beside it")
    parser.add_argument("--only", action="append", help="train this task alone")
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun and so on"
    )
    parser.add_argument("--data-only", action="store_true", help="write the validation and test files, train nothing")
    arguments = parser.parse_args()
    folder = arguments.set.resolve()
    made = cut(WordNet(arguments.wordnet), SETS[folder.name].tasks)
    for name, splits in made.items():
        write_data(folder, name, splits)
    if arguments.data_only:
        return
    taskset = read_taskset(folder)
    encoder = Encoder(taskset.base.locate(), taskset.max_length)
    for name in arguments.only or made:
        train(name, made[name], encoder, taskset)


if __name__ == "__main__":
    main()
