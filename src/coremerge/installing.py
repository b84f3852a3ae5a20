"""How to install what an extra of this package brings, for whoever has it from an index, a clone or a repository."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "coremerge"


def install(extra: str) -> str:
    """The command that installs this package again from where it came from, with ``extra``.

    Source: PEP 610, ``direct_url.json``: an installer leaves it where a package did not come from an index.
    """
    origin = _origin()
    if origin is None:
        return f"pip install '{NAME}[{extra}]'"
    url, info = str(origin.get("url", "")), origin.get("dir_info", {})
    place = Path(unquote(urlsplit(url).path))
    if "vcs_info" in origin:
        vcs, revision = (origin["vcs_info"].get(key) for key in ("vcs", "requested_revision"))
        url = f"{vcs or 'git'}+{url}" + (f"@{revision}" if revision else "")
    if "vcs_info" in origin or url.startswith(("http:", "https:")):  # a repository, or an archive
        inside = f"#subdirectory={origin['subdirectory']}" if origin.get("subdirectory") else ""
        return f"pip install '{NAME}[{extra}] @ {url}{inside}'"
    if url.startswith("file:") and place.exists():
        return f"pip install {'-e ' if info.get('editable') else ''}'{place}[{extra}]'"
    return f"pip install '.[{extra}]' in the clone that it was installed from"


def _origin() -> dict[str, Any] | None:
    """What the installer says; None of a package from an index, nothing of one that was never installed."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
        found = json.loads(text) if text else None
    except (PackageNotFoundError, ValueError):
        found = {}
    return found if found is None or isinstance(found, dict) else {}
