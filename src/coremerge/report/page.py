"""The report: one HTML file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from coremerge.errors import ConfigError, SourceError
from coremerge.report import svg
from coremerge.report.gather import MERGED, Numbers, Place, gather
from coremerge.report.record import read_record
from coremerge.text import redacted, visible_lines

if TYPE_CHECKING:
    from jinja2 import Template

    from coremerge.learning.result import Weights

FILE = "report.html"


@dataclass(frozen=True)
class Part:
    """One section.

    Attributes:
        title: its heading.
        text: what is seen in it, in a sentence or two.
        figures: caption and picture of each plot.
        table: headings and rows, where there is one.
        items: a list, where there is one.
    """

    title: str
    text: str = ""
    figures: Sequence[tuple[str, Markup]] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    items: Sequence[str] = ()


def report_page(
    folder: str | Path,
    *,
    inputs: Sequence[str | Path] | None = None,
    weights: str | Path | None = None,
    scores: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """The page of a merge.

    Args:
        folder: that ``coremerge merge`` wrote.
        inputs: where the adapters are now, in the merge's order; by default where they were.
        weights: the file of learned weights, for their path.
        scores: what ``coremerge evaluate --json`` printed.
        threads: modules side by side.
        progress: called as parts are done.

    Raises:
        CoremergeError: the folder is no merge, or a file is none of these.
    """
    folder = Path(folder)
    record = read_record(folder)
    learned = _weights(weights) if weights is not None else None
    scored = _scores(scores) if scores is not None else None
    if inputs is not None and len(inputs) != len(record["inputs"]):
        raise ConfigError(
            f"{len(inputs)} are given for a merge of {len(record['inputs'])}", key="inputs",
            remedy=f"Give them in this order: {', '.join(entry['name'] for entry in record['inputs'])}",
        )  # fmt: skip
    numbers = gather(folder, record, inputs, threads=threads, progress=progress)
    parts = [
        _went_in(record),
        _dropped(record, numbers),
        *_alignment(numbers),
        *_kept(numbers),
        *_strength(record, numbers),
        *_spectra(numbers),
        *_weighted(record, numbers, learned),
        *_scored(scored),
    ]
    title = "Merged model" if record["into"] else "Merged adapter"
    page = _template().render(
        title=title, name=folder.resolve().name, facts=list(_facts(record)), parts=parts, record=record,
        command=shlex.join(record["command"]) if record["command"] else None,
    )  # fmt: skip
    return visible_lines(redacted(page))


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe = record["recipe"]
    steps = "".join(f" + {step if isinstance(step, str) else next(iter(step))}" for step in recipe["steps"])
    yield "adapters", str(len(record["inputs"]))
    yield "method", record.get("made") or f"{recipe['method']}{steps}, {recipe['space']} space"
    yield "scale", f"{record['scale']:.4g}{' (auto)' if recipe['scale'] == 'auto' and not record.get('made') else ''}"
    yield "modules", str(len(record["modules"]))
    yield "rank", "of the base's weights" if record["into"] else str(record["rank"])
    yield "energy lost", f"{record['energy_lost']:.2%}" if record["energy_lost"] else "none"
    yield "stored as", record["dtype"]
    if record["base_model"]:
        yield "base model", str(record["base_model"])


def _went_in(record: Mapping[str, Any]) -> Part:
    headings = ["adapter", "from", "type", "ranks", "scales", "modules", "sha-256"]
    rows = []
    for entry in record["inputs"]:
        source = " @ ".join(str(entry[key]) for key in ("source", "revision") if entry[key])
        weights = [value for file, value in entry["sha256"].items() if not file.endswith(".json")]
        listed = [", ".join(f"{x:.4g}" for x in entry[key]) for key in ("ranks", "scales")]
        digest = weights[0][:12] if weights else ""
        rows.append([entry["name"], source or "memory", entry["type"], *listed, str(entry["modules"]), digest])
    return Part("What went in", table=(headings, rows))


def _dropped(record: Mapping[str, Any], numbers: Numbers) -> Part:
    items = [f"{name}: {decision}" for name, decision in record["extras"].items()]
    items += [note for note in dict.fromkeys([*record["warnings"], *record["notes"]]) if note not in items]
    items += [f"Not shown below, as an input is missing: {reason}" for reason in numbers.missing]
    text = "" if items else "Nothing was dropped, cut or assumed."
    return Part("What was dropped or decided", text, items=items)


def _alignment(numbers: Numbers) -> Iterator[Part]:
    found = numbers.alignment
    if found is None or len(found.names) < 2:
        return
    names = list(found.names)
    norms = ", ".join(f"{name} {norm:.3g}" for name, norm in found.norms.items())
    yield Part(
        "How alike the adapters are",
        "Left: the cosine between two adapters' updates, all shared modules as one vector: 0 is unrelated, negative"
        " is opposed. Right: how much of the row's update lies in the leading directions of the column's (subspace"
        f" alignment ratio). Norms of the updates: {norms}.",
        [
            ("cosine", svg.heatmap(names, names, _listed(found.cosine), svg.Range(-1, 1))),
            ("subspace alignment ratio", svg.heatmap(names, names, _listed(found.ratio), svg.Range(0, 1))),
        ],
    )


def _listed(matrix: Any) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


def _kept(numbers: Numbers) -> Iterator[Part]:
    if not numbers.kept:
        return
    columns, label = _columns(numbers.places)
    energy, own = [], []
    for by_module in numbers.kept.values():
        grouped: dict[str, list[Any]] = {column: [] for column in columns}
        for module, sums in by_module.items():
            grouped[label(numbers.places[module])].append(sums)
        energy.append([_ratio(listed, "kept") for listed in grouped.values()])
        own.append([_ratio(listed, "inner") for listed in grouped.values()])
    names = list(numbers.kept)
    yield Part(
        "What the merge keeps of each adapter",
        "By block of the model. First: the share of each update's energy that lies in the merged row and column"
        " spaces: 1 unless something was cut. Second: how much of an update, in its own direction, the merge has:"
        " 1 is all of it, and what other adapters add along it counts.",
        [
            ("retained energy", svg.heatmap(names, columns, energy, svg.Range(0, 1), cell=_cell(columns))),
            ("share in its own direction", svg.heatmap(names, columns, own, svg.Range(-1, 1), cell=_cell(columns))),
        ],
    )


def _ratio(listed: Sequence[Any], key: str) -> float | None:
    own = sum(sums.own for sums in listed)
    return sum(getattr(sums, key) for sums in listed) / own if own else None


def _columns(places: Mapping[str, Place]) -> tuple[list[str], Callable[[Place], str]]:
    """Blocks in order; modules outside of any by their kind."""

    def label(place: Place) -> str:
        return place.kind if place.layer is None else str(place.layer)

    layers = sorted({place.layer for place in places.values() if place.layer is not None})
    outside = sorted({place.kind for place in places.values() if place.layer is None})
    return [*map(str, layers), *outside], label


def _cell(columns: Sequence[str]) -> int:
    return svg.CELL if len(columns) <= 34 else max(9, 880 // len(columns))


def _strength(record: Mapping[str, Any], numbers: Numbers) -> Iterator[Part]:
    columns, label = _columns(numbers.places)
    kinds = list(dict.fromkeys(place.kind for place in numbers.places.values()))
    ratio: dict[tuple[str, str], list[float]] = {}
    rank: dict[tuple[str, str], list[float]] = {}
    for module, said in record["modules"].items():
        key = numbers.places[module].kind, label(numbers.places[module])
        if said["input_norm"]:
            ratio.setdefault(key, []).append(record["scale"] * said["norm"] / said["input_norm"])
        rank.setdefault(key, []).append(said["rank"])
    values = [[_average(ratio.get((kind, column))) for column in columns] for kind in kinds]
    ranks = [[_average(rank.get((kind, column))) for column in columns] for kind in kinds]
    highest = max((value for row in values for value in row if value is not None), default=1.0)
    top = max((value for row in ranks for value in row if value is not None), default=1.0)
    cell = _cell(columns)
    yield Part(
        "How strong it is, and of which rank",
        "By kind of module and block. First: the merged update's spectral norm over its inputs' mean one, with the"
        " scale applied. Second: the rank that was written.",
        [
            ("spectral norm, of the inputs'", svg.heatmap(kinds, columns, values, svg.Range(0, highest), cell=cell)),
            ("rank", svg.heatmap(kinds, columns, ranks, svg.Range(0, top, "{:.0f}".format), cell=cell)),
        ],
    )


def _average(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _spectra(numbers: Numbers) -> Iterator[Part]:
    drawn = [
        (kind, svg.lines(series, x_label="direction", y_label="singular value", width=460, height=240, main=MERGED))
        for kind, series in numbers.spectra.items()
    ]
    if drawn:
        what = "of the merge" if all(set(s) == {MERGED} for s in numbers.spectra.values()) else "of inputs and merge"
        yield Part("Spectra", f"Singular values {what}, averaged over the blocks, by kind of module.", drawn)


def _weighted(record: Mapping[str, Any], numbers: Numbers, learned: Weights | None) -> Iterator[Part]:
    table = record["recipe"]["weights"]
    figures: list[tuple[str, Markup]] = []
    if isinstance(table, Mapping) and any(isinstance(value, Mapping) for value in table.values()):
        figures.append(("weights by block", _weight_map(table, numbers.places)))
    rows: list[list[str]] = []
    if isinstance(table, Mapping) and not figures:
        rows = [[str(name), f"{value:.4g}"] for name, value in table.items()]
    elif isinstance(table, Sequence):
        rows = [[entry["name"], f"{value:.4g}"] for entry, value in zip(record["inputs"], table, strict=False)]
    if learned is not None:
        figures += _paths(learned)
    if figures or rows:
        yield Part("Weights", figures=figures, table=(["adapter", "weight"], rows) if rows else None)


def _weight_map(table: Mapping[str, Any], places: Mapping[str, Place]) -> Markup:
    columns, label = _columns(places)
    values = []
    for row in table.values():
        grouped: dict[str, list[float]] = {column: [] for column in columns}
        for module, value in (row if isinstance(row, Mapping) else dict.fromkeys(places, row)).items():
            if module in places:
                grouped[label(places[module])] += value if isinstance(value, list | tuple) else [value]
        values.append([_average(listed) for listed in grouped.values()])
    flat = [value for row in values for value in row if value is not None]
    high = max(map(abs, flat), default=1.0) or 1.0
    return svg.heatmap(list(table), columns, values, svg.Range(-high, high), cell=_cell(columns))


def _paths(learned: Weights) -> Iterator[tuple[str, Markup]]:
    if len(learned.objective):
        series = {task: learned.objective[:, i].tolist() for i, task in enumerate(learned.tasks)}
        yield "objective while learning", svg.lines(series, x_label="step", y_label=str(learned.settings["objective"]))
    counts = [sum(_size(v) for v in row.values()) for row in learned.table.values()]
    if learned.path.shape[-1] == sum(counts) and len(learned.path) > 1:
        parts = torch.split(learned.path, counts, dim=-1)
        means = [part.mean(-1).tolist() for part in parts if part.shape[-1]]
        series = dict(
            zip((name for name, count in zip(learned.table, counts, strict=True) if count), means, strict=True)
        )
        yield "mean weight while learning", svg.lines(series, x_label="step", y_label="weight", start=0)


def _size(value: float | tuple[float, ...]) -> int:
    return len(value) if isinstance(value, tuple) else 1


def _scored(data: Mapping[str, Any] | None) -> Iterator[Part]:
    if data is None:
        return
    tasks = list(data["tasks"])
    rows = [
        [str(row["label"]), _shown(row["mean"]), *(_shown(row["raw"].get(task)) for task in tasks)]
        for row in data["rows"]
    ]
    figures = []
    shares = [row for row in data["rows"] if row["normalised"]]
    if shares:
        values = [[row["normalised"].get(task) for task in tasks] for row in shares]
        labels = [str(row["label"]) for row in shares]
        figures = [
            ("mean of normalised scores", svg.bars([_bar(row) for row in shares])),
            ("normalised, by task", svg.heatmap(labels, tasks, values, svg.Range(0, 1), cell=34)),
        ]
    yield Part(
        "Scores",
        f"{data['name']}, {data['split']} rows. Normalised: as a share of each task's own adapter's score.",
        figures,
        table=(["", "normalised mean", *tasks], rows),
    )


def _bar(row: Mapping[str, Any]) -> tuple[str, float, tuple[float, float] | None]:
    mean, margin = float(row["mean"]), row["margin"]
    return str(row["label"]), mean, None if margin is None else (mean - margin, mean + margin)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _scores(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", file=path) from None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not {"name", "split", "tasks", "rows"} <= set(data):
        raise SourceError("not scores", file=path, remedy="Give what `coremerge evaluate --json` printed")
    return data


def _weights(path: str | Path) -> Weights:
    from coremerge.learning.result import read_weights

    return read_weights(path)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("coremerge.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
