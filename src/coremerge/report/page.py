"""The report: one HTML file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from coremerge.equal import said
from coremerge.errors import ConfigError
from coremerge.memory import memory_refused
from coremerge.report import svg
from coremerge.report.cuts import cut_of_fit, cut_to_rank, cuts_of, percent
from coremerge.report.fitted import fitted
from coremerge.report.gather import MERGED, Numbers, gather
from coremerge.report.part import Blocks, Part, Table
from coremerge.report.record import read_record
from coremerge.report.scored import read_scores, scored
from coremerge.report.weighted import plain_weights, weighted
from coremerge.text import redacted, visible_lines

if TYPE_CHECKING:
    from jinja2 import Template

    from coremerge.learning.result import Weights

FILE = "report.html"
_MARK = b"<footer>coremerge "

STRONG = 3
"""An adapter that counts so many times as strongly as the others' median is remarked on."""


@memory_refused()
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
    measured = read_scores(scores) if scores is not None else None
    if inputs is not None and len(inputs) != len(record["inputs"]):
        raise ConfigError(
            f"{len(inputs)} are given for a merge of {len(record['inputs'])}", key="inputs",
            remedy=f"Give them in this order: {', '.join(entry['name'] for entry in record['inputs'])}",
        )  # fmt: skip
    numbers = gather(folder, record, inputs, threads=threads, progress=progress)
    blocks = Blocks(numbers.places)
    parts = [
        _went_in(record),
        _dropped(record, numbers),
        *fitted(record, blocks),
        *_alignment(record, numbers),
        *_kept(numbers, blocks),
        *_strength(record, blocks),
        *_spectra(numbers),
        *weighted(record, blocks, learned),
        *scored(measured),
    ]
    title = "Merged model" if record["into"] else "Merged adapter"
    page = _template().render(
        title=title, name=folder.resolve().name, facts=list(_facts(record)), parts=parts, record=record,
        command=shlex.join(record["command"]) if record["command"] else None,
    )  # fmt: skip
    return visible_lines(redacted(page))


def is_report(path: Path) -> bool:
    """Whether a file is a page that :func:`report_page` made, and not somebody else's of that name."""
    try:
        return _MARK in path.read_bytes()
    except OSError:
        return False


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe = record["recipe"]
    steps = "".join(f" + {step if isinstance(step, str) else next(iter(step))}" for step in recipe["steps"])
    yield "adapters", str(len(record["inputs"]))
    yield "method", record.get("made") or f"{recipe['method']}{steps}, {recipe['space']} space"
    yield "scale", f"{record['scale']:.4g}{_how(recipe, record)}"
    if factors := record.get("norm_factors"):
        yield "norms", said(factors)
    yield "modules", str(len(record["modules"]))
    yield "rank", "of the base's weights" if record["into"] else str(record["rank"])
    if fit := record.get("fit"):
        lost = fit.get("outputs_lost")
        yield "outputs lost by the cut to its rank", percent(lost) if lost else "none"
    else:
        lost = record["energy_lost"]
        yield "energy lost by the cut to its rank", percent(lost) if lost else "none"
    if kept := record.get("input_kept"):
        yield (
            "energy merged of each adapter",
            " to ".join(dict.fromkeys(map(percent, (min(kept.values()), max(kept.values()))))),
        )
    yield "stored as", record["dtype"]
    if record["base_model"]:
        yield "base model", str(record["base_model"])


def _how(recipe: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    return f" ({recipe['scale']})" if isinstance(recipe["scale"], str) and not record.get("made") else ""


def _went_in(record: Mapping[str, Any]) -> Part:
    headings = ["adapter", "from", "type", "ranks", "scales", "modules", "sha-256"]
    kept = record.get("input_kept") or {}
    rows = []
    for entry in record["inputs"]:
        source = " @ ".join(str(entry[key]) for key in ("source", "revision") if entry[key])
        weights = [value for file, value in entry["sha256"].items() if not file.endswith(".json")]
        listed = [", ".join(f"{x:.4g}" for x in entry[key]) for key in ("ranks", "scales")]
        digest = weights[0][:12] if weights else ""
        rows.append([entry["name"], source or "memory", entry["type"], *listed, str(entry["modules"]), digest])
        rows[-1] += [percent(kept[entry["name"]]) if entry["name"] in kept else ""] if kept else []
    return Part(
        "What went in",
        table=Table([*headings, *(["energy merged"] if kept else [])], rows, numbers=[5, 7], long=[0, 1]),
    )


def _dropped(record: Mapping[str, Any], numbers: Numbers) -> Part:
    items = [*_cut(record), *(f"{name}: {decision}" for name, decision in record["extras"].items())]
    items += [note for note in dict.fromkeys([*record["warnings"], *record["notes"]]) if note not in items]
    items += [f"Not shown below, as it is missing: {reason}" for reason in numbers.missing]
    text = "" if items else "Nothing was dropped, cut or assumed."
    return Part("What was cut, dropped or decided", text, items=items)


def _cut(record: Mapping[str, Any]) -> Iterator[str]:
    recipe, warnings = record["recipe"], record["warnings"]
    if not record.get("made"):
        yield from cuts_of(
            recipe["method"], recipe.get("parameters", {}), recipe["steps"], record.get("input_kept"),
            space=recipe.get("space", "core"),
        )  # fmt: skip
    if fit := record.get("fit"):
        yield from cut_of_fit(fit.get("outputs_lost"), warnings)
    else:
        yield from cut_to_rank(record["rank"], record["energy_lost"], warnings)


def _alignment(record: Mapping[str, Any], numbers: Numbers) -> Iterator[Part]:
    found = numbers.alignment
    if found is None or len(found.names) < 2:
        return
    names = list(found.names)
    yield Part(
        "How alike the adapters are",
        "Cosine: between two adapters' updates, all shared modules as one vector: 0 is unrelated, negative is opposed."
        " Subspace alignment ratio: how much of the row's update lies in the leading directions of the column's."
        " Norm: Frobenius, of all updates together, at weight 1.",
        [
            ("cosine", svg.heatmap(names, names, _listed(found.cosine), svg.Range(-1, 1))),
            ("subspace alignment ratio", svg.heatmap(names, names, _listed(found.ratio), svg.Range(0, 1))),
            ("norm", svg.bars([(name, norm, None) for name, norm in found.norms.items()], show=_short)),
        ],
        items=list(_strong(found.norms, _counted(record))),
    )


def _counted(record: Mapping[str, Any]) -> dict[str, float]:
    """Adapter → what its updates were multiplied by: its weight, and what made it as large as the others."""
    plain, factors = plain_weights(record), record.get("norm_factors") or {}
    return {
        entry["name"]: plain.get(entry["name"], 1.0) * factors.get(entry["name"], 1.0) for entry in record["inputs"]
    }


def _strong(norms: Mapping[str, float], weights: Mapping[str, float]) -> Iterator[str]:
    """A remark on each adapter that stands out: see :data:`STRONG`."""
    counted = {name: norm * abs(weights.get(name, 1.0)) for name, norm in norms.items()}
    for name, norm in counted.items():
        others = median(other for key, other in counted.items() if key != name)
        if others and norm >= STRONG * others:
            yield (
                f"{name} counts {norm / others:.1f} times as strongly as the others (their median norm): it drowns them"
                f" where updates are added up, and lifts an automatic scale. A weight of"
                f" {weights.get(name, 1.0) * others / norm:.2g} would make it count as much as they do."
            )


def _short(value: float) -> str:
    return f"{value:.3g}"


def _listed(matrix: Any) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


def _kept(numbers: Numbers, blocks: Blocks) -> Iterator[Part]:
    if not numbers.kept:
        return
    names, cells = list(numbers.kept), blocks.by_row(list(numbers.kept.values()))
    energy, own = ([[_ratio(listed, key) for listed in row] for row in cells] for key in ("kept", "inner"))
    yield Part(
        "What the merge keeps of each adapter",
        "By block of the model. First: the share of each update's energy that lies in the merged row and column"
        " spaces: 1 unless something was cut. Second: how much of an update, in its own direction, the merge has:"
        " 1 is all of it, and what other adapters add along it counts.",
        [
            ("retained energy", blocks.drawn(names, energy, svg.Range(0, 1))),
            ("share in its own direction", blocks.drawn(names, own, svg.Range(-1, 1))),
        ],
    )


def _ratio(listed: Sequence[Any], key: str) -> float | None:
    own = sum(sums.own for sums in listed)
    return sum(getattr(sums, key) for sums in listed) / own if own else None


def _strength(record: Mapping[str, Any], blocks: Blocks) -> Iterator[Part]:
    modules = record["modules"]
    ratio = {
        name: record["scale"] * said["norm"] / said["input_norm"]
        for name, said in modules.items()
        if said["input_norm"]
    }
    ranks = {name: said["rank"] for name, said in modules.items()}
    lost = {name: said.get("lost") or 0.0 for name, said in modules.items()}
    figures = [
        ("spectral norm, of the inputs'", blocks.kind_map(ratio, _up_to(ratio))),
        ("rank", blocks.kind_map(ranks, _up_to(ranks, "{:.0f}"))),
    ]
    third = ""
    if any(lost.values()):
        figures.append(("energy lost by the cut to that rank", blocks.kind_map(lost, _up_to(lost))))
        third = " Third: the share of the merged update's energy that the cut to that rank lost."
    yield Part(
        "How strong it is, and of which rank",
        "By kind of module and block. First: the merged update's spectral norm over its inputs' mean one, with the"
        f" scale applied. Second: the rank that was written.{third}",
        figures,
    )


def _up_to(values: Mapping[str, float], show: str = "{:.2f}") -> svg.Range:
    return svg.Range(0, max(values.values(), default=1.0), show.format)


def _spectra(numbers: Numbers) -> Iterator[Part]:
    drawn = [
        (kind, svg.lines(series, x_label="direction", y_label="singular value", width=460, height=240, main=MERGED))
        for kind, series in numbers.spectra.items()
    ]
    if drawn:
        what = "of the merge" if all(set(s) == {MERGED} for s in numbers.spectra.values()) else "of inputs and merge"
        yield Part("Spectra", f"Singular values {what}, averaged over the blocks, by kind of module.", drawn)


def _weights(path: str | Path) -> Weights:
    from coremerge.learning.result import read_weights

    return read_weights(path)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("coremerge.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
