"""benchmarks/RESULTS.md, written section by section: a run replaces its own section and leaves the others alone."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent
HEAD = "# Results\n\nWritten by the scripts of this folder, never by hand: each section says how, when and where."
PACKAGES = ("coremerge", "torch", "safetensors", "peft", "numpy")


def machine() -> str:
    """Processor, cores, memory, accelerator and system of this machine."""
    import torch

    parts = [f"{_processor()}, {usable_cores()} cores", f"{_memory() / 2**30:.0f} GB memory"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"{platform.system()} {platform.machine()}"])


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> str:
    """Python's and the packages' that matter here."""
    return ", ".join([f"Python {platform.python_version()}", *map(version, PACKAGES)])


def version(package: str) -> str:
    """Name and version, or that it is not there."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers to three figures, and to the right."""
    lines = [list(header), *([_cell(cell) for cell in row] for row in rows)]
    numeric = [all(isinstance(row[i], float | int) for row in rows) for i in range(len(header))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    marks = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, numeric, strict=True)]
    lines.insert(1, marks)
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def command() -> str:
    """The command that is running, as a person would type it; without the folders of this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    words = re.sub(r" --(work|results|findings|source)[ =]\S+", "", " " + shlex.join(sys.argv[1:]))
    return f"python {name}{words}".rstrip()


def write(section: str, body: str, raw: object, *, seed: int, folder: Path = ROOT, about: str | None = None) -> None:
    """Put ``section`` into RESULTS.md under ``folder``, and its raw numbers into results.json.

    ``about`` is that of an earlier run, where its numbers are only shown anew.
    """
    load = os.getloadavg()[0]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about = (
        about or f"`{command()}`, seed {seed}, {now}. {machine()}. {versions()}. Load average at the end: {load:.1f}."
    )
    text = f"## {section}\n\n{about}\n\n{body.strip()}\n"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "RESULTS.md"
    parts = re.split(r"(?m)^(?=## )", page.read_text(encoding="utf-8")) if page.exists() else [HEAD]
    titles = [part.split("\n", 1)[0] for part in parts]
    if f"## {section}" in titles:
        parts[titles.index(f"## {section}")] = text
    else:
        parts.append(text)
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    numbers = folder / "results.json"
    known = json.loads(numbers.read_text()) if numbers.exists() else {}
    numbers.write_text(json.dumps(known | {section: {"about": about, "numbers": raw}}, indent=1, sort_keys=True) + "\n")
    print(f"\n{text}", flush=True)
