"""Learned merge weights, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coremerge.errors import OutputError, SourceError, TensorError
from coremerge.formats.atomic import check_file, write_file
from coremerge.formats.safetensors_file import SafetensorsFile

FORMAT = "coremerge.weights.1"


@dataclass(frozen=True, eq=False)
class Weights(Mapping[str, Mapping[str, "float | tuple[float, ...]"]]):
    """Adapter name → module name → merge weight, or one weight per rank component: what ``Recipe(weights=…)`` takes.

    Attributes:
        table: the weights; an adapter's modules that it lacks are absent.
        settings: what they were learned with.
        tasks: those whose inputs were used, in the order of ``objective``.
        objective: (steps, tasks) of every step, before it was taken.
        path: (steps + 1, coefficients) from the start to the end.
        state: of the optimiser, to go on.
        notes: what the person should know, in plain words.
    """

    table: Mapping[str, Mapping[str, float | tuple[float, ...]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    objective: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    path: Tensor = field(default_factory=lambda: torch.zeros(1, 0))
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, adapter: str) -> Mapping[str, float | tuple[float, ...]]:
        return self.table[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.objective)

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """Adapter name → mean, least and largest weight."""
        found = {}
        for name, row in self.table.items():
            values = [v for value in row.values() for v in as_tuple(value)]
            found[name] = (math.fsum(values) / len(values), min(values), max(values))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "weights": {name: dict(row) for name, row in self.table.items()},
            "settings": dict(self.settings),
            "objective": [dict(zip(self.tasks, row, strict=True)) for row in self.objective.tolist()],
            "notes": list(self.notes),
        }

    def flat(self) -> Tensor:
        """All weights, in the order of the table, in float64."""
        values = [v for row in self.table.values() for value in row.values() for v in as_tuple(value)]
        return torch.tensor(values, dtype=torch.float64)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write them into a ``.safetensors`` file, complete or not at all.

        Raises:
            OutputError: it exists, or cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        check_output(path, overwrite=overwrite)
        layout = {
            name: {module: len(value) if isinstance(value, tuple) else 0 for module, value in row.items()}
            for name, row in self.table.items()
        }
        described = {
            "format": FORMAT,
            "layout": json.dumps(layout),
            "tasks": json.dumps(self.tasks),
            "settings": json.dumps(dict(self.settings)),
            "notes": json.dumps(self.notes),
        }
        tensors = {"weights": self.flat(), "objective": self.objective.float(), "path": self.path.float()}
        tensors |= {f"state.{key}": value for key, value in self.state.items()}
        write_file(path, save({k: v.contiguous() for k, v in tensors.items()}, described), overwrite=overwrite)


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that is there already, or a name that :func:`read_weights` would not be asked to read.

    Raises:
        OutputError: it is one of these.
    """
    if path.suffix != ".safetensors":
        raise OutputError("weights are written as .safetensors", file=path, remedy=f"Call it {path.name}.safetensors")
    check_file(path, overwrite=overwrite)


def as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """The weights of one module, whether it has one or one per rank component."""
    return value if isinstance(value, tuple) else (value,)


def read_weights(path: str | Path) -> Weights:
    """Read what :meth:`Weights.save` wrote.

    Raises:
        SourceError: not there, or not such a file.
    """
    path = Path(path)
    try:
        file = SafetensorsFile(path)
        said, tensors = file.metadata, {key: file.read(key) for key in file.entries}
        if said.get("format") != FORMAT:
            raise ValueError("it was not written by coremerge learn-weights")
        layout, values = json.loads(said["layout"]), tensors["weights"].tolist()
        return Weights(
            _table(layout, values),
            json.loads(said["settings"]),
            tuple(json.loads(said["tasks"])),
            tensors["objective"],
            tensors["path"],
            {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")},
            tuple(json.loads(said["notes"])),
        )
    except TensorError as error:
        raise SourceError(f"is no file of merge weights: {error.what}", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"is no file of merge weights: {error}", file=path) from None


def _table(
    layout: Mapping[str, Mapping[str, int]], values: Sequence[float]
) -> dict[str, dict[str, float | tuple[float, ...]]]:
    if not all(map(math.isfinite, values)):
        raise ValueError("weights that are not finite")
    if sum(max(n, 1) for row in layout.values() for n in row.values()) != len(values):
        raise ValueError("not as many weights as modules have")
    left = iter(values)
    return {
        name: {module: tuple(islice(left, n)) if n else next(left) for module, n in row.items()}
        for name, row in layout.items()
    }
