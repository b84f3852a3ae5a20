"""Scores as a table and bars."""

from __future__ import annotations

from typing import Any

from coremerge.report.scored import scored


def row(label: str, raw: dict[str, float], shares: dict[str, float], **more: Any) -> dict[str, Any]:
    mean = sum(shares.values()) / len(shares) if shares else None
    return {"label": label, "mean": mean, "margin": None, "raw": raw, "normalised": shares, **more}


def test_nothing_is_drawn_without_scores() -> None:
    assert list(scored(None)) == []


def test_each_row_names_its_worst_task_and_each_number_its_interval() -> None:
    one = row("one", {"t": 0.4, "u": 0.9}, {"t": 0.5, "u": 0.25}, intervals={"u": [0.8, 0.96]})
    data = {"name": "set", "split": "test", "tasks": {"t": {"metric": "f1", "rows": 9}, "u": {}}, "rows": [one]}
    (part,) = scored(data)
    assert part.table is not None
    assert part.table.headings == ["", "mean", "worst", "in task", "t\nf1, 9 rows", "u"]
    assert part.table.rows == [["one", "0.375", "0.250", "u", "0.400", "0.900 ± 0.080"]]
    assert sum(count for _, count in part.table.groups) == len(part.table.headings)


def test_whiskers_are_explained_where_there_are_any() -> None:
    for margin in (None, 0.1):
        data = {
            "name": "s",
            "split": "test",
            "tasks": ["t"],
            "rows": [row("a", {"t": 1}, {"t": 1}) | {"margin": margin}],
        }
        (part,) = scored(data)
        assert ("whiskers" in part.figures[0][0]) == (margin is not None)


def test_without_own_adapters_there_is_no_normalised_column() -> None:
    (part,) = scored({"name": "s", "split": "test", "tasks": ["t"], "rows": [row("a", {"t": 0.5}, {})]})
    assert part.table is not None
    assert (part.table.headings, part.table.rows, part.figures) == (["", "t"], [["a", "0.500"]], [])
    assert sum(count for _, count in part.table.groups) == 2
