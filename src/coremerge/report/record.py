"""coremerge.json: what a merge was, beside its result, for the report and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coremerge.errors import SourceError
from coremerge.formats.vera import TYPES as VERA
from coremerge.text import redacted, redacted_words, visible_json

if TYPE_CHECKING:
    from coremerge.adapter import Info
    from coremerge.outcome import Report
    from coremerge.plan import Plan

FILE = "coremerge.json"
FORMAT = "coremerge.merge.1"


def make_record(
    plan: Plan,
    report: Report,
    sha256: Mapping[str, Mapping[str, str]],
    *,
    command: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    dtype: str,
    into: str | None = None,
    base: str | None = None,
    vera_width: int | None = None,
    rename: Mapping[str, str] | None = None,
) -> str:
    """The file's text: nothing in it changes from one run to the next of the same merge, and no secret is in it.

    ``base`` and ``vera_width``: what VeRA adapters were read with.
    """
    from coremerge import __version__

    inputs = [
        {
            "name": name,
            "source": adapter.info.source,
            "revision": adapter.info.revision,
            "type": adapter.info.type,
            "base_model": adapter.info.base_model,
            "modules": len(adapter),
            "ranks": sorted({module.rank for module in adapter.modules.values()}),
            "scales": sorted({module.scale for module in adapter.modules.values()}),
            "sha256": dict(sha256[name]),
            "read": _read_with(adapter.info, base, vera_width),
        }
        for name, adapter in plan.adapters.items()
    ]
    said = report.to_dict()
    del said["seconds"]
    data = {
        "format": FORMAT,
        "version": __version__,
        "command": None if command is None else redacted_words(command),
        "recipe": plan.recipe.model_dump(mode="json"),
        "inputs": inputs,
        "dtype": dtype,
        "into": into,
        "rename": dict(rename or {}),
        "base_model": plan.info.base_model,
        "extras": {name: extra.decision for name, extra in plan.extras.items()},
        "notes": list(notes),
        **said,
    }
    return visible_json(redacted(json.dumps(data, ensure_ascii=False))) + "\n"


def _read_with(info: Info, base: str | None, vera_width: int | None) -> dict[str, Any]:
    """What its files cannot be read without, as :func:`coremerge.load` takes it."""
    vera = info.type.upper() in VERA
    read = {
        "base": base if vera else None,
        "vera_width": vera_width if vera else None,
        "initial": info.initial,
        "allow_pickle": any(file.suffix not in (".json", ".safetensors") for file in info.files),
    }
    return {key: value for key, value in read.items() if value}


class _Read(BaseModel):
    """Arguments of :func:`coremerge.load`."""

    model_config = ConfigDict(extra="forbid")

    base: str | None = None
    vera_width: int | None = None
    initial: str | None = None
    allow_pickle: bool = False


class _Input(BaseModel):
    name: str
    source: str | None
    revision: str | None
    type: str
    modules: int
    ranks: list[int]
    scales: list[float]
    sha256: dict[str, str]
    read: _Read = _Read()


class _Recipe(BaseModel):
    space: str | dict[str, Any]
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    steps: list[str | Annotated[dict[str, dict[str, Any] | None], Field(min_length=1, max_length=1)]]
    scale: float | str
    weights: list[float | list[Any]] | dict[str, float | list[Any] | dict[str, float | list[float]]] | None


class _Module(BaseModel):
    rank: int
    norm: float
    input_norm: float | None
    lost: float = 0.0


class _ModuleFit(BaseModel):
    prior: float
    fitted: float
    kept: bool
    checked: bool = True
    lost: float = 0.0


class _Fit(BaseModel):
    prior: str
    outputs_lost: float = 0.0
    modules: dict[str, _ModuleFit]


class _Record(BaseModel):
    """What is read of the file, so that another one is refused and not tripped over."""

    version: str
    command: list[str] | None
    recipe: _Recipe
    inputs: list[_Input]
    modules: dict[str, _Module]
    dtype: str
    into: str | None
    rename: dict[str, str] = Field(default_factory=dict)
    base_model: str | None
    rank: int | None
    scale: float
    energy_lost: float | None
    extras: dict[str, str]
    notes: list[str]
    warnings: list[str]
    made: str | None = None
    input_kept: dict[str, float] = Field(default_factory=dict)
    norm_factors: dict[str, float] = Field(default_factory=dict)
    fit: _Fit | None = None


def changes(
    record: Mapping[str, Any],
    plan: Plan,
    sha256: Mapping[str, Mapping[str, str]],
    *,
    dtype: str,
    into: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[str]:
    """In what the merge of a record differs from the one that is planned now, in plain words; empty: in nothing.

    Where inputs lie does not matter, what they hold does.
    """
    now = {
        "recipe": plan.recipe.model_dump(mode="json"),
        "inputs": {name: dict(sha256[name]) for name in plan.adapters},
        "shapes": {name: planned.module.shape for name, planned in plan.modules.items()},
        "dtype": dtype,
        "into": into,
        "rename": dict(rename or {}),
        "made": None,
    }
    try:
        then = {
            "recipe": dict(record["recipe"]),
            "inputs": {held["name"]: dict(held["sha256"]) for held in record["inputs"]},
            "shapes": {name: module["shape"] for name, module in record["modules"].items()},
            "rename": record.get("rename", {}),
            **{key: record[key] for key in ("dtype", "into", "made")},
        }
        return [*_versions(record["version"]), *_differences(then, json.loads(json.dumps(now)))]
    except (KeyError, TypeError, ValueError, AttributeError):
        return [f"{FILE} is incomplete"]


def _versions(then: object) -> Iterator[str]:
    from coremerge import __version__

    if then != __version__:
        yield f"made by version {then}, this is {__version__}"


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    before, inputs = then["inputs"], now["inputs"]
    if [*before] != [*inputs]:
        yield f"made of {', '.join(before)}, not of {', '.join(inputs)}"
    for name in before.keys() & inputs.keys():
        files = before[name].keys() | inputs[name].keys()
        changed = sorted(file for file in files if before[name].get(file) != inputs[name].get(file))
        if changed:
            yield f"{name} has changed: {', '.join(changed)}"
    for key, value in now["recipe"].items():
        if then["recipe"].get(key) != value:
            yield f"{key} was {_short(then['recipe'].get(key))}, not {_short(value)}"
    for key in ("dtype", "into", "rename", "made"):
        if then[key] != now[key]:
            yield f"{key} was {_short(then[key])}, not {_short(now[key])}"
    if then["shapes"] != now["shapes"]:
        yield "other modules or shapes"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_record(folder: str | Path) -> dict[str, Any]:
    """What :func:`make_record` wrote into a merge's folder.

    Raises:
        SourceError: there is none, or it is another file.
    """
    path = Path(folder) / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"cannot be read: {error.strerror or error}", file=path, remedy="Give a folder that coremerge merge wrote"
        ) from None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SourceError("not a record of a merge", file=path, remedy="Give a folder that coremerge merge wrote")
    try:
        _Record.model_validate(data, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        raise SourceError(
            f"not a whole record of a merge: {detail['msg']}", file=path, key=".".join(map(str, detail["loc"])),
            remedy="Merge again",
        ) from None  # fmt: skip
    return data
