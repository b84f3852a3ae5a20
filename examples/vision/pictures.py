"""The domains' pictures as arrays: those of training in a work folder, made once; those that ship from their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from domains import COUNTS, Domains, Record
from numpy.typing import NDArray
from PIL import Image
from tasks import TASKS, Task

WEBP = {"format": "WEBP", "quality": 65, "method": 6}


class Table(dict[str, NDArray[Any]]):
    """Key of a record → the records' values, one below the other."""


def training_table(domains: Domains, domain: str, count: int, work: Path) -> Table:
    """The training records of a domain, kept in ``work``."""
    path = work / f"{domain}.{count}.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        records = list(domains.records(domain, "train", count))
        table = {key: np.stack([np.asarray(record[key]) for record in records]) for key in records[0]}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **table)
        partial.rename(path)
    with np.load(path) as file:
        return Table({key: file[key] for key in file.files})


def write_data(folder: Path, domains: Domains) -> None:
    """Writes ``data/``: the pictures of every domain, labels that are maps, and each task's rows."""
    for domain in dict.fromkeys(task.domain for task in TASKS.values()):
        tasks = {name: task for name, task in TASKS.items() if task.domain == domain}
        for split, count in COUNTS.items():
            rows: dict[str, list[str]] = {name: [] for name in tasks}
            names = []
            for place, record in enumerate(domains.records(domain, split, count)):
                names.append(f"{domain}/{split}-{place:03d}.webp")
                _write_picture(folder / "data" / names[-1], record)
                if split == "unlabelled":
                    continue
                for name, task in tasks.items():
                    label = _label(folder / "data" / domain, f"{split}-{place:03d}", task, record)
                    rows[name].append(json.dumps({"image": names[-1], "label": label}))
            if split == "unlabelled":
                _write_lines(folder / "data" / f"{domain}.jsonl", [json.dumps({"image": name}) for name in names])
            else:
                for name, lines in rows.items():
                    _write_lines(folder / "data" / f"{name}.{split}.jsonl", lines)


def _write_picture(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(record["image"]).save(path, **WEBP)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _label(folder: Path, stem: str, task: Task, record: Record) -> Any:
    """As a row holds it: a word, a number, some numbers, or the path of a map beside the picture."""
    value = record[task.key]
    if not task.pixels:
        return value if isinstance(value, str) else np.round(value, 5).tolist()
    path = folder / f"{stem}.{task.key}.png"
    Image.fromarray(as_map(value)).save(path, optimize=True)
    return f"{folder.name}/{path.name}"


def as_map(values: NDArray[Any]) -> NDArray[np.uint8]:
    """A map's 8 bits: classes as they are, shares of 1 times 255, normals (n + 1) / 2 times 255 in three channels."""
    if values.dtype == np.uint8:
        return values
    shares = (values + 1) / 2 if values.ndim == 3 else values
    return (shares * 255).clip(0, 255).round().astype(np.uint8)


def shipped_table(folder: Path, name: str, split: str) -> tuple[NDArray[np.uint8], list[Any]]:
    """Pictures and labels of a task's rows, maps as arrays of their 8 bits."""
    lines = (folder / "data" / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    images = [np.asarray(Image.open(folder / "data" / row["image"]).convert("RGB")) for row in rows]
    labels = [row["label"] for row in rows]
    if TASKS[name].pixels:
        labels = [np.asarray(Image.open(folder / "data" / label)) for label in labels]
    return np.stack(images), labels
