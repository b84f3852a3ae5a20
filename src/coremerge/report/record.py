"""coremerge.json: what a merge was, beside its result, for the report and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge.errors import SourceError

if TYPE_CHECKING:
    from coremerge.merging import Report
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
) -> str:
    """The file's text: nothing in it changes from one run to the next of the same merge."""
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
        }
        for name, adapter in plan.adapters.items()
    ]
    said = report.to_dict()
    del said["seconds"]
    data = {
        "format": FORMAT,
        "version": __version__,
        "command": None if command is None else list(command),
        "recipe": plan.recipe.model_dump(mode="json"),
        "inputs": inputs,
        "dtype": dtype,
        "into": into,
        "base_model": plan.info.base_model,
        "extras": {name: extra.decision for name, extra in plan.extras.items()},
        "notes": list(notes),
        **said,
    }
    return json.dumps(data, ensure_ascii=False) + "\n"


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
    return data
