"""What a search tries: merges in the spelling of recipes, where a list stands for every value of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coremerge.errors import ConfigError
from coremerge.evaluation.scales import Scales
from coremerge.methods.whiten import EVEN
from coremerge.recipe import Recipe, read_values
from coremerge.registry import Spec
from coremerge.yamlfile import Whole, read_yaml, refusal

OF_RECIPE = "recipe."
MEAN = "mean"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Merge(_Part):
    """One method to tune, with every value that is to be tried.

    Attributes:
        label: of its row; made from the rest by default.
        recipe: the values of a recipe, in its spelling.
        tried: parameter of the method → its values, the first of them the default; a key of the recipe itself
            (``rank``, ``basis``) stands behind :data:`OF_RECIPE`.
    """

    label: str
    recipe: dict[str, Any]
    tried: dict[str, tuple[Any, ...]] = {}


class Plan(_Part):
    """What is searched.

    Attributes:
        merges: each tuned under the same budget.
        scales: see :class:`Scales`.
        order: ``grid``: every combination of parameters, each at its best scale; ``coordinate``: the scale at the
            default parameters first, then one parameter after the other at the best so far.
        budget: validation scores for each merge.
        target: what is tuned for, and the winner chosen by: ``mean``, the average over tasks; or a joint group of the
            task set: accuracy with the task of a row unknown.
    """

    merges: tuple[Merge, ...] = Field(min_length=1)
    scales: Scales = Scales()
    order: Literal["grid", "coordinate"] = "grid"
    budget: Whole = Field(default=100, ge=1)
    target: str = MEAN


def recipe_of(merge: Merge, values: Mapping[str, Any], **changes: Any) -> Recipe:
    """The recipe with these values of what is tried, see :attr:`Merge.tried`."""
    recipe = {"rank": "exact", **merge.recipe}
    parameters = dict(recipe.get("parameters") or {})
    for key, value in values.items():
        if key.startswith(OF_RECIPE):
            recipe[key.removeprefix(OF_RECIPE)] = value
        else:
            parameters[key] = value
    if parameters:
        recipe["parameters"] = parameters
    return Recipe(**{**recipe, **changes})


def combinations(tried: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All of them, the last parameter changing first."""
    for values in itertools.product(*tried.values()):
        yield dict(zip(tried, values, strict=True))


def read_plan(path: str | Path) -> Plan:
    """Read a plan from YAML: merges in the spelling of recipes, where a list stands for every value to try.

    A merge with several spaces, or several lists of steps, is as many merges; lists of parameters, and of other keys,
    are tuned within each.

    Raises:
        SourceError: the file cannot be read.
        ConfigError: a key or a value that means nothing.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict) or not isinstance(data.get("merges"), list):
        raise ConfigError("a list of merges is needed", file=path, key="merges", remedy="See coremerge search --help")
    try:
        return make_plan(**data)
    except ValidationError as error:
        raise refusal(error, path) from None
    except ConfigError as error:
        raise ConfigError(str(error), file=path) from None


def make_plan(merges: Sequence[object], **rest: Any) -> Plan:
    """A plan from what its file says.

    Raises:
        ValidationError: a key or value beside the merges that means nothing.
        ConfigError: or in a merge.
    """
    return Plan(merges=tuple(one for entry in merges for one in _expanded(entry)), **rest)


def _expanded(entry: object) -> Iterator[Merge]:
    """A merge for every space and every list of steps; lists of parameters are tuned within."""
    if not isinstance(entry, Mapping):
        raise ConfigError("a merge is a mapping", key="merges", value=entry)
    values = {str(key): value for key, value in entry.items()}
    label = values.pop("label", None)
    parameters = values.pop("parameters", None) or {}
    spaces, steps = values.pop("space", "core"), values.pop("steps", None)
    tried = {key: tuple(value) for key, value in parameters.items() if isinstance(value, list)}
    fixed = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    for key in list(values):
        if isinstance(values[key], list) and key not in ("models", "weights"):
            tried[OF_RECIPE + key] = tuple(values.pop(key))
    for space in spaces if isinstance(spaces, list) else [spaces]:
        for listed in steps if isinstance(steps, list) and any(isinstance(s, list) for s in steps) else [steps]:
            recipe = read_values({**values, "space": space, "steps": listed, "parameters": fixed})
            merge = Merge(label=_label(label, recipe, space, listed), recipe=recipe, tried=tried)
            for one in combinations(tried):
                recipe_of(merge, one)  # refuses here what would fail later
            yield merge


def _label(label: str | None, recipe: Mapping[str, Any], space: Spec, steps: Sequence[Spec] | None) -> str:
    named = label or str(recipe.get("method", "default"))
    more = " + ".join(str(step) for step in steps or ())
    return f"{space} {named}" + (f" + {more}" if more else "")


DENSITIES = [0.1, 0.2, 0.3]
DROPS = [0.5, 0.1, 0.9]
PLAN = make_plan(
    [
        {"merge_method": "sum"},
        {"merge_method": "ties", "space": ["full", "knots", "core"], "parameters": {"density": DENSITIES}},
        {"merge_method": "dare_ties", "parameters": {"drop_rate": DROPS}},
        {"merge_method": "tsv", "steps": [[], ["isotropize"]]},
        {"merge_method": "cart", "parameters": {"rank": [8, 4, 16]}},
        {"merge_method": "sum", "steps": ["isotropize"]},
        {"merge_method": "tsv", "steps": ["isotropize"], "parameters": {"rank": [4, 2, 8]}, "label": "few directions"},
        {"merge_method": "whiten", "norms": "equal", "parameters": {"even": [0, EVEN]}, "label": "default"},
    ],
    budget=20,
)
"""What is tried where nothing else is asked for: published methods, and the default, as it is and even."""
