"""A paper's table from its public adapters: ``python recipes/reproduce.py knots-vit-b-32 OUT``.

Fetches the adapters and the data that the set's file names, writes a task set to OUT (adapters as safetensors, heads,
rows), and has coremerge search and score on it; of sets that generate text, it learns weights, merges, and leaves
scoring to the harness that the set's file names. ``--joint`` tunes for rows whose task is unknown. ``--mirror FOLDER``:
hub ids are folders there; nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from coremerge import Adapter, load
from coremerge.errors import CoremergeError

HERE = Path(__file__).parent
JOINT = "all"
"""The group of all tasks, where the task of a row is unknown."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """One task.

    Attributes:
        adapter: hub id.
        data: hub id of the data set, its configuration, and the split that tests.
        tuning: the split that tunes; by default a share of ``split`` does, and the rest of it tests.
        held_out: that share, where there is no such split.
        columns: of the row → of the data set: text, pair, image; label.
        classes: names that stand for its labels, by their order there; those of the data set's feature by default.
        labels: values of the label's column, in the order of ``classes``, where they are not 0, 1, ...
        head_rows: of the adapter's own head, where not all of them are classes here.
        prompt: text that goes with every row, where there is no column of it.
        templates: of an image's caption, for a head from CLIP's text encoder.
        paper: the score of the task's own adapter that the paper reports.
    """

    adapter: str
    data: str
    config: str | None = None
    split: str = "test"
    tuning: str | None = None
    held_out: float = Field(default=0.2, gt=0, lt=1)
    columns: dict[str, str]
    classes: tuple[str, ...] = ()
    labels: tuple[int | str, ...] = ()
    head_rows: tuple[int, ...] = ()
    prompt: str | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)
    paper: float | None = None


class Set(_Part):
    """Adapters of one base.

    Attributes:
        description: which table, and what is known to differ.
        base: hub id.
        kind: how it is scored: ``images``: heads from CLIP's text encoder; ``pairs``: the adapters' own heads, on the
            last token; ``generation``: not here.
        max_length: tokens of a row.
        dtype: that the base runs in; float32 by default.
        plan: what is searched, a file beside this one.
        learn: options of ``coremerge learn-weights``, where NSC's weights are learned, too.
        then: how the merge is scored, for generation.
        tasks: by name.
    """

    description: str
    base: str
    kind: Literal["images", "pairs", "generation"]
    max_length: int | None = None
    dtype: str | None = None
    plan: str | None = None
    learn: tuple[str, ...] = ()
    then: str = ""
    tasks: dict[str, Source] = Field(min_length=1)


def read_set(name: str) -> Set:
    """A set of this folder."""
    return Set(**yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Hub:
    """Where ids are: the hub, or folders."""

    mirror: Path | None = None

    def place(self, name: str) -> str:
        return str(self.mirror / name) if self.mirror else name

    def rows(self, source: Source, split: str) -> Any:
        """A split of the data set."""
        import datasets

        if self.mirror:
            return datasets.load_from_disk(self.place(source.data))[split]
        return datasets.load_dataset(source.data, source.config, split=split)


def prepare(made: Set, out: Path, hub: Hub, limit: int | None) -> None:
    """The task set, or for generation the inputs, under ``out``."""
    clip = Captions(hub.place(made.base)) if made.kind == "images" else None
    if clip:
        clip.save_vision(out / "base")
    tasks: dict[str, Any] = {}
    for name, source in made.tasks.items():
        print(f"{name}: {source.adapter}, {source.data}", flush=True)
        data = hub.rows(source, source.split)
        if made.kind == "generation":
            write_rows(
                out / "data" / f"{name}.jsonl", examples(data, source, out / "images" / name, range(limit or 64))
            )
            continue
        adapter = load(hub.place(source.adapter), allow_pickle=True)
        # weights only: the head goes to a file of its own, as every task keeps its own
        Adapter.from_updates(dict(adapter), name=name).save(out / "adapters" / name, dtype="float32", overwrite=True)
        classes = source.classes or tuple(data.features[source.columns["label"]].names)
        named = source.model_copy(update={"classes": classes})
        head = clip.head(classes, source.templates) if clip else own_head(adapter, source)
        (out / "heads").mkdir(exist_ok=True)
        save_file(head, out / "heads" / f"{name}.safetensors")
        for split, part in splits(data, named, hub, out / "images" / name, limit).items():
            write_rows(out / "data" / f"{name}.{split}.jsonl", part)
        tasks[name] = {
            "kind": "classification", "metric": "accuracy", "classes": list(classes), "adapter": f"adapters/{name}",
            "head": f"heads/{name}.safetensors", "validation": f"data/{name}.validation.jsonl",
            "test": f"data/{name}.test.jsonl",
        }  # fmt: skip
    if tasks:
        task_set: dict[str, Any] = {
            "name": out.name,
            "description": made.description,
            "base": {"path": "base"} if clip else {"hub_id": hub.place(made.base)},
            "pooling": "pooler" if clip else "last",
            "tasks": tasks,
        } | ({"joint": {JOINT: list(tasks)}} if clip else {})
        task_set |= {key: value for key in ("max_length", "dtype") if (value := getattr(made, key)) is not None}
        (out / "tasks.yaml").write_text(yaml.safe_dump(task_set, sort_keys=False), encoding="utf-8")


def splits(data: Any, source: Source, hub: Hub, images: Path, limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """Rows that tune and rows that test, ``limit`` of both together, or of each where each is a split of its own."""
    test = list(examples(data, source, images, drawn(len(data), limit)))
    if source.tuning:
        other, folder = hub.rows(source, source.tuning), images.with_name(f"{images.name}.tuning")
        return {"validation": list(examples(other, source, folder, drawn(len(other), limit))), "test": test}
    cut = max(1, len(test) - int((1 - source.held_out) * len(test)))
    return {"validation": test[:cut], "test": test[cut:]}


def drawn(count: int, limit: int | None) -> Sequence[int]:
    """Rows in an order of their own, the same every time; ``limit`` of them."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order[:limit]


def examples(data: Any, source: Source, images: Path, places: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows as coremerge reads them; those without a label that is known are left out."""
    classes = source.classes
    labels = source.labels or tuple(range(len(classes)))
    for place in places:
        if place >= len(data):
            return
        row = data[place]
        found: dict[str, Any] = {"text": source.prompt} if source.prompt else {}
        if classes:
            if row[source.columns["label"]] not in labels:
                continue
            found["label"] = classes[labels.index(row[source.columns["label"]])]
        for key in ("text", "pair"):
            if key in source.columns:
                found[key] = row[source.columns[key]]
        if "image" in source.columns:
            path = images / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row[source.columns["image"]].convert("RGB").save(path)
            found["image"] = f"../images/{images.name}/{path.name}"
        yield found


def write_rows(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def own_head(adapter: Adapter, source: Source) -> dict[str, torch.Tensor]:
    """The classifier that was trained and saved with a PEFT adapter for sequence classification."""
    key = next((key for key in adapter.extras if key.rpartition(".")[0].endswith(("score", "classifier"))), None)
    if key is None:
        raise SystemExit(f"{source.adapter} has no head: its whole tensors are {sorted(adapter.extras)}")
    weight = adapter.extras[key].float()
    return {"weight": (weight[list(source.head_rows)] if source.head_rows else weight).contiguous()}


class Captions:
    """CLIP's two towers: a classifier from captions, and the vision tower alone."""

    def __init__(self, name: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        self._name = name
        self._model = CLIPModel.from_pretrained(name)
        self._processor = AutoProcessor.from_pretrained(name)

    @torch.inference_mode()
    def head(self, classes: Sequence[str], templates: Sequence[str]) -> dict[str, torch.Tensor]:
        """Cosines with captions, as a linear map of the pooled image: its own norm changes no ranking of classes."""
        tower, project = self._model.text_model, self._model.text_projection
        rows = []
        for name in classes:
            captions = [template.format(name.replace("_", " ")) for template in templates]
            tokens = self._processor(text=captions, return_tensors="pt", padding=True, truncation=True)
            found = torch.nn.functional.normalize(project(tower(**tokens).pooler_output), dim=-1).mean(0)
            rows.append(torch.nn.functional.normalize(found, dim=-1))
        return {"weight": (torch.stack(rows) @ self._model.visual_projection.weight).contiguous().clone()}

    def save_vision(self, path: Path) -> None:
        from transformers import CLIPVisionModel

        CLIPVisionModel.from_pretrained(self._name).save_pretrained(path)
        self._processor.image_processor.save_pretrained(path)


def commands(made: Set, out: Path, hub: Hub, device: str, *, joint: bool = False) -> list[list[str]]:
    """What is run once everything is there."""
    if made.kind == "generation":
        places = {task: hub.place(source.adapter) for task, source in made.tasks.items()}
        return weighted(made, out, hub, device, {place: f"{task}.jsonl" for task, place in places.items()})
    assert made.plan is not None
    plan, scored = str(HERE / made.plan), ["--tasks", str(out), "--device", device]
    found = str(out / ("winner-joint.yaml" if joint else "winner.yaml"))
    search = ["search", *scored, "--plan", plan, "-o", found, "--overwrite"]
    if joint or not made.learn:
        return [search + (["--target", JOINT] if joint else [])]
    own = {str(out / "adapters" / name): f"{name}.validation.jsonl" for name in made.tasks}
    return [search, *weighted(made, out, hub, device, own), ["evaluate", str(out / "merged"), *scored]]


def weighted(made: Set, out: Path, hub: Hub, device: str, data_of: Mapping[str, str]) -> list[list[str]]:
    """NSC's weights for adapters, each with its file of inputs, and the merge with them."""
    adapters, weights = list(data_of), str(out / "weights.safetensors")
    data = [f"--data={Path(adapter).name}={out / 'data' / file}" for adapter, file in data_of.items()]
    base = ["--base", hub.place(made.base), "--device", device, *made.learn]
    return [
        ["learn-weights", *adapters, *base, *data, "-o", weights, "--overwrite"],
        ["merge", *adapters, "--method", "sum", "--scale", "1", "--weights", weights, "--extras", "average",
         "-o", str(out / "merged"), "--overwrite"],
    ]  # fmt: skip


def run(listed: Sequence[Sequence[str]]) -> None:
    """Each with this Python's coremerge, shown as a person would type it."""
    for arguments in listed:
        print("coremerge", *arguments, flush=True)
        subprocess.run([Path(sys.executable).with_name("coremerge"), *arguments], check=True)


def main(arguments: list[str] | None = None) -> None:
    known: Mapping[str, Set] = {path.stem: read_set(path.stem) for path in sorted(HERE.glob("*.yaml"))}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set", choices=known)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, help="of each task; all by default, and 64 inputs for generation")
    parser.add_argument("--joint", action="store_true", help="tune for rows whose task is unknown (images only)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mirror", type=Path, help="a folder with ORG/NAME folders instead of the hub")
    parser.add_argument("--only-prepare", action="store_true", help="and print the commands")
    given = parser.parse_args(arguments)
    made, hub = known[given.set], Hub(given.mirror)
    if given.joint and made.kind != "images":
        parser.error("--joint: the labels of these tasks cannot be joined")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        prepare(made, given.out, hub, given.rows)
    except (OSError, CoremergeError) as error:
        raise SystemExit(f"error: {error}\nWithout the hub: --mirror FOLDER, with the same ids as folders") from None
    listed = commands(made, given.out, hub, given.device, joint=given.joint)
    if given.only_prepare:
        print("\n".join(" ".join(["coremerge", *words]) for words in listed))
    else:
        run(listed)
    if made.then:
        print(made.then)


if __name__ == "__main__":
    main()
