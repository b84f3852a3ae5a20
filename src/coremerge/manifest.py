"""A manifest of many merges: recipes × sets of adapters, in one YAML file."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coremerge.errors import ConfigError, InputError
from coremerge.recipe import RecipeFile, read_recipe, recipe_from
from coremerge.yamlfile import NameText, Whole, read_mapping, refusal

DEFAULT = "default"
"""The recipe of a manifest that has none."""

LONGEST = 200
"""Bytes of a name: file systems take 255, and a folder that is being written has a longer one."""


def folded(name: str) -> str:
    """The name as file systems see it that do not tell case."""
    return unicodedata.normalize("NFC", name).casefold()


def _plain(name: str) -> str:
    """``name``, which becomes a folder's: it must be one part of a path, on every system."""
    odd = {c for c in name if c in '/\\:*?"<>|' or unicodedata.category(c)[0] == "C"}
    if not name or odd or name.startswith(".") or name != name.strip().rstrip(".") or len(name.encode()) > LONGEST:
        raise ValueError(
            'a name becomes a folder: no / \\ : * ? " < > |, no control characters, no dot in front or at the end,'
            f" no space around it, at most {LONGEST} bytes"
        )
    return name


def _whole(text: str) -> str:
    text.encode()  # half a character cannot be; pydantic makes the error one of its own
    return text


Name = Annotated[NameText, AfterValidator(_plain)]
Text = Annotated[NameText, AfterValidator(_whole)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Set(_Part):
    """Adapters to merge; a list of them, or these keys, which are those of :func:`coremerge.pipeline.merge_files`.

    Attributes:
        models: folders, files, URLs or hub ids.
        base: the base model, for a VeRA adapter that needs it.
        vera_width: in place of ``base``.
        initial: label or source of a PiSSA-like adapter → where its initial adapter is.
        into: a base model; the results are then that model with the merged update added.
        rename: beginning of modules' names → what it is in the results.
    """

    models: tuple[Text, ...] = Field(min_length=1)
    base: Text | None = None
    vera_width: Whole | None = Field(default=None, ge=1)
    initial: dict[Text, Text] = {}
    into: Text | None = None
    rename: dict[Text, Text] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        if not isinstance(value, (list, Mapping)):
            raise ValueError("a set is a list of adapters, or a mapping with the key models")
        return {"models": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _says_widths_once(self) -> Set:
        if self.vera_width is not None and (self.base or self.into):
            raise ValueError("vera_width stands in place of base and into")
        return self


class Choice(_Part):
    """One merge.

    Attributes:
        set: of the manifest's sets.
        recipe: of its recipes.
        name: of the result's folder; by default one named after the recipe in one named after the set.
    """

    set: NameText
    recipe: NameText = DEFAULT
    name: Name | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The result's place below the folder of all results."""
        return (self.set, self.recipe) if self.name is None else (self.name,)


class Manifest(_Part):
    """Many merges.

    Attributes:
        folder: where the file lies: all paths are relative to it.
        sets: name → :class:`Set`.
        recipes: name → a recipe in the spelling of recipe files, or the path of one.
        jobs: what is merged; by default every set with every recipe.
    """

    folder: Path = Path()
    sets: dict[Name, Set] = Field(min_length=1)
    recipes: dict[Name, Any] = Field(default={DEFAULT: None}, min_length=1)
    jobs: Annotated[tuple[Choice, ...], Field(min_length=1)] | None = None

    @field_validator("sets", "recipes")
    @classmethod
    def _are_told_apart(cls, value: dict[str, Any]) -> dict[str, Any]:
        seen: dict[str, str] = {}
        for name in value:
            if folded(name) in seen:
                raise ValueError(f"{seen[folded(name)]} and {name} are one name where case does not count")
            seen[folded(name)] = name
        return value

    @model_validator(mode="after")
    def _jobs_are_apart(self) -> Manifest:
        taken: dict[tuple[str, ...], str] = {}
        for choice in self.choices():
            for key, known in (("set", self.sets), ("recipe", self.recipes)):
                if getattr(choice, key) not in known:
                    raise ValueError(f"jobs: there is no {key} {getattr(choice, key)!r}; known: {', '.join(known)}")
            place = tuple(map(folded, choice.parts))
            if place in taken:
                raise ValueError(f"jobs: two would be written to {'/'.join(choice.parts)}: give them names")
            taken[place] = "/".join(choice.parts)
        inside = next((taken[place] for place in taken if place[:1] in taken and len(place) > 1), None)
        if inside:
            raise ValueError(f"jobs: {inside} would be written into another result: give that one another name")
        return self

    def choices(self) -> tuple[Choice, ...]:
        """All merges, sets in their order, so that adapters which are read serve one after the other."""
        return self.jobs or tuple(Choice(set=one, recipe=recipe) for one in self.sets for recipe in self.recipes)

    def recipe(self, name: str) -> RecipeFile:
        """The recipe of that name.

        Raises:
            ConfigError: its file cannot be read, a key or value that means nothing, or adapters, which sets list.
        """
        try:
            return self._recipe(self.recipes[name])
        except InputError as error:
            raise ConfigError(str(error), key=f"recipes.{name}") from None

    def _recipe(self, said: object) -> RecipeFile:
        if isinstance(said, str):
            found = read_recipe(self.folder / Path(said).expanduser())
        elif said is None or isinstance(said, Mapping):
            found = recipe_from(said or {})
        else:
            raise ConfigError("a recipe is a mapping of keys to values, or the path of its file", value=said)
        if found.models:
            raise ConfigError(
                "adapters are listed under sets", key="models", value=found.models,
                remedy="Leave them out of the recipe; weights may name adapters: weights: {math: 0.5}",
            )  # fmt: skip
        return found


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest, and every recipe in it.

    Raises:
        SourceError: it cannot be read.
        ConfigError: not YAML, or a key or value that means nothing.
    """
    path = Path(path)
    data = read_mapping(path, "a manifest")
    try:
        manifest = Manifest.model_validate({**data, "folder": path.parent})
    except ValidationError as error:
        raise refusal(error, path) from None
    try:
        for name in manifest.recipes:
            manifest.recipe(name)
    except ConfigError as error:
        raise ConfigError(str(error), file=path) from None
    return manifest
