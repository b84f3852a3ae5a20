"""A task set: tasks.yaml in a folder, and the files it names beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coremerge.errors import ConfigError, SourceError

FILE = "tasks.yaml"
Split = Literal["validation", "test"]


class Row(NamedTuple):
    """One labelled example: a text, or two that go into the encoder together."""

    text: str
    pair: str | None
    label: float
    """A class's index, or the value to predict."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Part):
    """The base encoder.

    Attributes:
        hub_id: its name on the hub.
        package: a Python package that carries the same model, for machines without the hub.
        subfolder: where in that package.
    """

    hub_id: str
    package: str | None = None
    subfolder: str = "."

    def locate(self) -> str:
        """What ``from_pretrained`` is to be given: the package's folder where it is installed, else the hub id."""
        spec = importlib.util.find_spec(self.package) if self.package else None
        return str(Path(spec.origin).parent / self.subfolder) if spec and spec.origin else self.hub_id


class Task(_Part):
    """One task; its paths are relative to the folder of the file.

    Attributes:
        description: what is predicted, in a line.
        kind: ``classification`` (the head gives one number per class) or ``regression`` (one number).
        metric: ``accuracy`` or ``pearson``.
        classes: the labels, in the order of the head's rows.
        adapter: folder of the adapter trained on this task alone.
        head: safetensors file with ``weight`` (outputs, width) and ``bias``.
        validation: rows, a JSON object a line: ``text``, ``label`` and, for pairs, ``pair``.
        test: likewise.
    """

    description: str
    kind: Literal["classification", "regression"]
    metric: Literal["accuracy", "pearson"]
    classes: tuple[str, ...] = ()
    adapter: str
    head: str
    validation: str
    test: str

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        if (self.kind == "classification") != (self.metric == "accuracy"):
            raise ValueError(f"metric {self.metric} does not go with {self.kind}")
        if (self.kind == "classification") != bool(self.classes):
            raise ValueError("classes are listed for classification, and only there")
        return self

    @property
    def outputs(self) -> int:
        """The number of rows of the head."""
        return len(self.classes) or 1


class TaskSet(_Part):
    """Tasks that share a base encoder.

    Attributes:
        folder: where the file lies.
        pooling: over the tokens of the last layer.
        max_length: tokens a row is cut to.
    """

    folder: Path = Path()
    name: str
    description: str = ""
    base: Base
    pooling: Literal["mean"] = "mean"
    max_length: int = Field(ge=1)
    tasks: dict[str, Task] = Field(min_length=1)

    def path(self, relative: str) -> Path:
        """A path of the file as seen from here."""
        return self.folder / relative

    def rows(self, task: str, split: Split, limit: int | None = None) -> list[Row]:
        """The rows of a split, the first ``limit`` of them.

        Raises:
            SourceError: the file is missing.
            ConfigError: a line is not a row of this task.
        """
        path = self.path(getattr(self.tasks[task], split))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()[:limit]
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
        return [_row(line, self.tasks[task], path, number) for number, line in enumerate(lines, 1)]


def read_taskset(source: str | Path) -> TaskSet:
    """Read a task set.

    Args:
        source: the folder with ``tasks.yaml``, or a file of that kind.

    Raises:
        SourceError: there is none.
        ConfigError: it has a key or a value that means nothing.
    """
    path = Path(source) / FILE if Path(source).is_dir() else Path(source)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"cannot be read: {error.strerror}", file=path, remedy=f"Give a folder with a {FILE}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", file=path) from None
    if not isinstance(data, Mapping):
        raise ConfigError("a mapping of keys to values is needed", file=path, value=data)
    try:
        return TaskSet(**{**data, "folder": path.parent})
    except ValidationError as error:
        raise _refusal(error, path) from None


def _refusal(error: ValidationError, path: Path) -> ConfigError:
    detail = error.errors()[0]
    missing = detail["type"] == "missing"
    found: dict[str, Any] = {} if missing else {"value": detail["input"]}
    return ConfigError(
        detail["msg"].removeprefix("Value error, "),
        file=path,
        key=".".join(map(str, detail["loc"])),
        remedy="Add the key" if missing else "Remove or correct it",
        **found,
    )


def _row(line: str, task: Task, path: Path, number: int) -> Row:
    try:
        data = json.loads(line)
        text, pair, label = data["text"], data.get("pair"), data["label"]
        return Row(str(text), None if pair is None else str(pair), _label(label, task))
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = f"one of {', '.join(task.classes)}" if task.classes else "a number"
        raise ConfigError(
            "not a row of this task",
            file=f"{path}, line {number}",
            value=line,
            remedy=f'Give {{"text": ..., "label": ...}}, the label {expected}',
        ) from None


def _label(label: object, task: Task) -> float:
    return float(task.classes.index(str(label))) if task.classes else float(label)  # type: ignore[arg-type]
