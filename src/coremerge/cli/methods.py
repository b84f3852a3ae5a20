"""coremerge methods: what the registries know."""

from __future__ import annotations

import shutil
import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge.cli._output import print_json, say

if TYPE_CHECKING:
    from coremerge.catalog import Part

USAGE = {"method": "--method NAME -p KEY=VALUE", "space": "--space NAME[:KEY=VALUE]", "step": "--step NAME[:KEY=VALUE]"}


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One of them, in full.", metavar="NAME", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, spaces and steps.

    With their parameters, defaults and papers; methods by what they are for.
    """
    from coremerge.catalog import GROUPS, catalog, find

    if name is not None:
        part = find(name)
        print_json(part.to_dict()) if as_json else say(_in_full(part))
        return
    parts = catalog()
    if as_json:
        listed = {f"{kind}s": [part.to_dict() for part in parts if part.kind == kind] for kind in USAGE}
        print_json({**listed, "groups": GROUPS})
        return
    for kind, usage in USAGE.items():
        say(f"{kind}s  ({usage})\n")
        for group, members in groupby((part for part in parts if part.kind == kind), key=lambda part: part.group):
            if group is not None:
                say("\n".join(_wrap(f"{group}: {GROUPS[group]}" if group in GROUPS else group, 0)) + "\n")
            say("\n".join(map(_line, members)) + "\n")
    say("coremerge methods NAME tells more of one.")


def _line(part: Part) -> str:
    settings = ", ".join(f"{p.name}={_shown(p.default)}" if not p.required else p.name for p in part.parameters)
    told = "\n".join(filter(None, [part.help, settings and f"parameters: {settings}", part.source]))
    lines = [line for given in told.splitlines() for line in _wrap(given, 14)]
    return f"  {part.name:<12}{lines[0][14:]}\n" + "".join(f"{line}\n" for line in lines[1:])


def _in_full(part: Part) -> str:
    lines = [f"{part.kind} {part.name}", "", *part.description.splitlines(), ""]
    for p in part.parameters:
        default = "required" if p.required else f"default {_shown(p.default)}"
        lines += [f"  {p.name}  ({p.type}; {default})", *_wrap(p.help, 6)]
    lines += ["", f"use     {USAGE[part.kind].replace('NAME', part.name)}"]
    lines += [f"group   {part.group}"] if part.group else []
    lines += [f"nature  {text}" for text in part.nature]
    lines += [f"source  {part.source}"] if part.source else []
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _wrap(text: str, indent: int) -> list[str]:
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
