"""What the options of ``coremerge merge`` say, as the parts of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from coremerge.executors import Executor
    from coremerge.recipe import Recipe, RecipeFile


def recipe_file(path: Path | None) -> RecipeFile:
    """The recipe file, or the defaults."""
    from coremerge.recipe import Recipe, RecipeFile, read_recipe

    return RecipeFile(Recipe()) if path is None else read_recipe(path)


def override(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """``recipe`` with ``options`` in place of what it says.

    Another method brings its own parameters; a recipe's steps, and norms that it names, stay.
    Parameters without a method are added to the recipe's.
    """
    from coremerge.recipe import Recipe

    said = {key: value for key, value in recipe if key in recipe.model_fields_set}
    if "method" not in options or options["method"] == said.get("method"):
        options = {**options, "parameters": {**recipe.parameters, **options.get("parameters", {})}}
    else:
        said.pop("parameters", None)
    return Recipe(**{**said, **options})


def parameters(pairs: Sequence[str] | None) -> dict[str, Any] | None:
    """``-p key=value`` …; values as YAML reads them."""
    return {key: _scalar(value) for key, value in _pairs(pairs, "-p / --parameter", "KEY=VALUE")} if pairs else None


def _scalar(text: str) -> Any:
    from coremerge.yamlfile import parse_yaml

    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float, list, type(None))) else text


def steps(named: Sequence[str] | None, none: bool) -> list[str] | None:
    """``--step`` … or ``--no-steps``."""
    if named and none:
        raise typer.BadParameter("not together with --step", param_hint="--no-steps")
    return [] if none else list(named) if named else None


def number_or(text: str | None, words: Sequence[str], option: str) -> float | str | None:
    """A number, or a word that stands for it."""
    if text is None or text in words:
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor {' or '.join(words)}", param_hint=option) from None


def whole_or(text: str | None, word: str, option: str) -> int | str | None:
    """A whole number, at least 1, or the one word that stands for it."""
    if text is None or text == word:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 on nor {word!r}", param_hint=option)
    return int(text)


def executor(
    name: str, address: str | None, device: str = "cpu", gpus: int = 1
) -> AbstractContextManager[Executor | None]:
    """``--executor``, ``--address`` and ``--gpus``; entered when the work begins."""
    if name not in ("local", "ray"):
        raise typer.BadParameter(f"{name!r} is neither 'local' nor 'ray'", param_hint="--executor")
    if name == "local":
        if address is not None:
            raise typer.BadParameter("goes with --executor ray", param_hint="--address")
        return nullcontext()
    return _cluster(address, 0 if device == "cpu" else gpus)


@contextmanager
def _cluster(address: str | None, gpus: int) -> Iterator[Executor]:
    from coremerge.executors.ray import Ray

    with Ray(address, gpus=gpus) as cluster:
        yield cluster


LEAST = 10**6
"""Bytes: a smaller number without a unit was not meant as bytes."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def memory(text: str | None, option: str) -> int | None:
    """A number of bytes: ``8GB``, ``500M``, ``1.5 GiB``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if not found or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no amount of memory such as 8GB or 500M", param_hint=option)
    unit = found[2]
    power = list(UNITS).index(unit)
    count = int(float(found[1]) * (1024**power if found[3] else UNITS[unit]))
    if text.strip() == found[1] and count < LEAST:
        raise typer.BadParameter(
            f"{text!r} has no unit, and would be bytes: write {text}GB or {text}MB", param_hint=option
        )
    return count


def weights(text: str | None) -> Any:
    """``0.5,0.5`` or ``name=0.5,name=1``, JSON, or a file: of such a list or mapping, or of learned weights."""
    if text is None:
        return None
    if text.lstrip()[:1] in ("{", "["):
        return _json(text, "--weights")
    if Path(text).suffix.lower() in {".json", ".yaml", ".yml"}:
        return _weights_in(Path(text))
    if Path(text).suffix == ".safetensors":
        from coremerge.learning.result import read_weights

        return read_weights(text)
    if "=" in text:
        return {key: _weight(value) for key, value in _pairs(_parts(text), "--weights", "NAME=NUMBER")}
    return [_weight(part.strip()) for part in text.split(",")]


def _json(text: str, option: str) -> Any:
    from coremerge.yamlfile import parse_json

    try:
        return parse_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=option) from None


def _parts(text: str) -> list[str]:
    """``name=number`` …, split at the commas; one before the ``=`` is the name's own."""
    parts = [""]
    for piece in text.split(","):
        if "=" in parts[-1]:
            parts.append(piece)
        else:
            parts[-1] += f",{piece}" if parts[-1] else piece
    return parts


def _weight(text: str, option: str = "--weights") -> float:
    try:
        return float(text)
    except ValueError:
        forms = ". Give 0.5,0.5 or name=0.5,name=1, match, nsc-own, nsc, or a file" if option == "--weights" else ""
        raise typer.BadParameter(f"{text!r} is not a number{forms}", param_hint=option) from None


def _weights_in(path: Path) -> Any:
    from coremerge.errors import ConfigError
    from coremerge.yamlfile import read_yaml

    found = read_yaml(path)
    if not isinstance(found, (list, dict)):
        raise ConfigError("weights are a list, or a mapping of adapters", file=path, value=found)
    return found


def initial(
    pairs: Sequence[str] | None, names: Iterable[str], option: str = "--initial", form: str = "NAME=PATH"
) -> dict[str, str]:
    """``--initial name=path`` …, or of another ``option`` of that form; the longest of ``names`` that fits counts."""
    known = {name for source in names for name in (source, Path(source).name)}
    return dict(_pairs(pairs or (), option, form, known))


def rename(pairs: Sequence[str] | None) -> dict[str, str]:
    """``--rename old=new`` …"""
    return dict(_pairs(pairs or (), "--rename", "OLD=NEW"))


def numbers(pairs: Sequence[str] | None, option: str) -> dict[str, float]:
    """``name=number`` …"""
    return {key: _weight(value, option) for key, value in _pairs(pairs or (), option, "NAME=NUMBER")}


def interval(text: str | None, option: str) -> tuple[float, float] | None:
    """``low,high``"""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise typer.BadParameter(f"{text!r} is not LOW,HIGH", param_hint=option)
    return low, high


def one_of(text: str | None, known: Sequence[str], option: str) -> str | None:
    """One of some words."""
    if text is not None and text not in known:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(known)}", param_hint=option)
    return text


def _pairs(texts: Sequence[str], option: str, form: str, known: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Split at the first ``=``; before a number at the last one, as a name may hold others."""
    pairs: dict[str, str] = {}
    for text in texts:
        name = max((name for name in known if text.startswith(f"{name}=")), key=len, default="")
        key, sign, value = text.rpartition("=") if form == "NAME=NUMBER" else text[len(name) :].partition("=")
        key, value = (name + key).strip(), value.strip()
        if not (key and sign and value):
            raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
        if key in pairs:
            raise typer.BadParameter(f"{key!r} is there twice", param_hint=option)
        pairs[key] = value
    return list(pairs.items())
