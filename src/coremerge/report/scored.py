"""The report of scores: what coremerge evaluate measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coremerge.errors import SourceError
from coremerge.report import svg
from coremerge.report.part import Part, Table


def read_scores(path: str | Path) -> dict[str, Any]:
    """What ``coremerge evaluate --json`` printed.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", file=path) from None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not {"name", "split", "tasks", "rows"} <= set(data):
        raise SourceError("not scores", file=path, remedy="Give what `coremerge evaluate --json` printed")
    return data


def scored(data: Mapping[str, Any] | None) -> Iterator[Part]:
    """A section, if there are scores."""
    if data is None:
        return
    rows, tasks = data["rows"], list(data["tasks"])
    shares = [row for row in rows if row["normalised"]]
    figures = []
    if shares:
        values = [[row["normalised"].get(task) for task in tasks] for row in shares]
        labels = [str(row["label"]) for row in shares]
        whiskers = "; whiskers: its 95 % interval" if any(row["margin"] is not None for row in shares) else ""
        figures = [
            (f"mean of the normalised scores{whiskers}", svg.bars([_bar(row) for row in shares])),
            ("normalised score, by task", svg.heatmap(labels, tasks, values, svg.Range(0, 1), cell=34)),
        ]
    yield Part(
        "Scores",
        f"{data['name']}, {data['split']} rows. Normalised: as a share of each task's own adapter's score. As measured:"
        " in each task's own metric. ±: half the 95 % interval, from the rows that were scored.",
        figures,
        table=_table(data["tasks"], rows, bool(shares)),
    )


def _table(tasks: Mapping[str, Any] | Sequence[str], rows: Sequence[Mapping[str, Any]], normalised: bool) -> Table:
    said = tasks if isinstance(tasks, Mapping) else {}
    heads = [_task(task, said.get(task) or {}) for task in tasks]
    if not normalised:
        cells = [[str(row["label"]), *_measured(row, tasks)] for row in rows]
        return Table(["", *heads], cells, [("", 1), ("as measured", len(heads))], range(1, 1 + len(heads)))
    cells = [[str(row["label"]), _mean(row), *_worst(row), *_measured(row, tasks)] for row in rows]
    groups = [("", 1), ("normalised", 3), ("as measured", len(heads))]
    return Table(["", "mean", "worst", "in task", *heads], cells, groups, [1, 2, *range(4, 4 + len(heads))])


def _task(name: str, said: Mapping[str, Any]) -> str:
    """Its metric and how many rows were scored, beneath its name."""
    more = [str(said["metric"])] if said.get("metric") else []
    more += [f"{said['rows']} rows"] if said.get("rows") else []
    return f"{name}\n{', '.join(more)}".strip()


def _mean(row: Mapping[str, Any]) -> str:
    return _shown(row["mean"], row["margin"])


def _worst(row: Mapping[str, Any]) -> tuple[str, str]:
    shares = row["normalised"]
    if not shares:
        return "", ""
    task = min(shares, key=shares.__getitem__)
    return f"{shares[task]:.3f}", str(task)


def _measured(row: Mapping[str, Any], tasks: Mapping[str, Any] | Sequence[str]) -> Iterator[str]:
    intervals = row.get("intervals") or {}
    for task in tasks:
        low, high = intervals.get(task, (None, None))
        yield _shown(row["raw"].get(task), None if low is None else (high - low) / 2)


def _shown(value: float | None, half: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"


def _bar(row: Mapping[str, Any]) -> tuple[str, float, tuple[float, float] | None]:
    mean, margin = float(row["mean"]), row["margin"]
    return str(row["label"]), mean, None if margin is None else (mean - margin, mean + margin)
