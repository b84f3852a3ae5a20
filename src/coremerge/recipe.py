"""What to do: a validated recipe, from keywords, the command line or a YAML file in mergekit's spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coremerge.errors import ConfigError
from coremerge.registry import Spec
from coremerge.yamlfile import read_mapping

if TYPE_CHECKING:
    from coremerge.lowrank import LowRank, Matrix
    from coremerge.methods import Method
    from coremerge.spaces import Space

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
DEFAULT_STEPS: list[Spec] = ["isotropize"]
DEFAULT_PARAMETERS = {"rank": 4}

_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}

Weight = float | tuple[float, ...]
"""Of a module, or of each of its rank components."""

Weights = Sequence[float] | Mapping[str, float | Mapping[str, Weight]]


class Recipe(BaseModel):
    """How adapters become one.

    Args:
        space: ``core`` (default), ``knots`` or ``full``; with parameters as ``"knots:scaled=false"``.
        method: a name of ``coremerge methods``.
        parameters: the method's. The default method goes with ``rank=4``, a method that is named with its own
            defaults.
        steps: applied in order: those that act on updates before the method, the others on its result. They belong to
            the default method: a method that is named comes without steps unless they are named, too.
        basis: of the core space: ``stacked`` or ``balanced``.
        weights: None (all one), a number per adapter in order, a mapping of names to numbers, or a mapping of names to
            mappings of module names to numbers (a module that is not listed counts as 1) or to one number per rank
            component; what :func:`coremerge.learning.learn_weights` returns. Adapters that come in a sequence and have
            none of the names are matched by order.
        normalize: divide the weights by their sum, per module.
        scale: the one factor of the whole merge; ``"auto"`` sets it from norms: see
            :func:`coremerge.outcome.auto_scale`.
        rank: of the output: a number, ``"exact"``, or None: the default, exact.
        seed: for methods that draw random masks.
        dtype: of the output; by default the inputs' own.
        extras: what to do where several adapters carry different whole tensors (``modules_to_save``, token rows):
            None refuses; ``"average"``, ``"drop"``, or the name of the adapter to take them from.
        allow_disjoint: merge adapters none of whose modules coincide.

    Raises:
        ConfigError: a key or a value that means nothing.

    Example:
        >>> Recipe().method, Recipe().parameters, Recipe().steps
        ('tsv', {'rank': 4}, ['isotropize'])
        >>> Recipe(method="ties").parameters, Recipe(method="ties").steps
        ({}, [])
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Spec = "core"
    method: str = "tsv"
    parameters: dict[str, Any] = DEFAULT_PARAMETERS
    steps: list[Spec] = DEFAULT_STEPS
    basis: Literal["stacked", "balanced"] = "stacked"
    weights: Weights | None = None
    normalize: bool = False
    scale: Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"] = "auto"
    rank: Annotated[int, Field(ge=1)] | Literal["exact"] | None = None
    seed: int = 0
    dtype: Dtype | None = None
    extras: str | None = None
    allow_disjoint: bool = False

    def __init__(self, **values: Any) -> None:
        named = "method" in values
        if values.get("steps") is None:
            values["steps"] = [] if named else DEFAULT_STEPS
        if values.get("parameters") is None:
            values["parameters"] = {} if named else DEFAULT_PARAMETERS
        try:
            super().__init__(**values)
        except ValidationError as error:
            detail = error.errors()[0]
            raise ConfigError(
                detail["msg"],
                key=".".join(map(str, detail["loc"][:1])),
                value=detail["input"],
                remedy=f"A recipe takes: {', '.join(type(self).model_fields)}"
                if detail["type"] == "extra_forbidden"
                else None,
            ) from None

    @field_validator("weights", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        return (
            {k: dict(v) if isinstance(v, Mapping) else v for k, v in value.items()}
            if isinstance(value, Mapping)
            else value
        )

    @field_validator("dtype", mode="before")
    @classmethod
    def _alias(cls, value: object) -> object:
        name = str(value).removeprefix("torch.")
        return None if value is None else _DTYPES.get(name, name)

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        self.parts()
        return self

    def parts(self) -> Parts:
        """The recipe's functions, made from the registries.

        Raises:
            ConfigError: an unknown name or parameter.
        """
        from coremerge.methods import METHODS
        from coremerge.registry import parse_spec
        from coremerge.spaces import SPACES
        from coremerge.steps import STEPS, After, Before

        name, options = parse_spec(self.space, "space")
        steps = [STEPS.build(step) for step in self.steps]
        if name == "core":
            unitary = [METHODS[self.method].unitary, *(STEPS[parse_spec(step)[0]].unitary for step in self.steps)]
            options = {"basis": self.basis, "singular": not all(unitary), **options}
        return Parts(
            SPACES[name].make(options),
            METHODS[self.method].make(self.parameters),
            tuple(s.apply for s in steps if isinstance(s, Before)),
            tuple(s.apply for s in steps if isinstance(s, After)),
            METHODS[self.method].linear and not any(isinstance(s, After) for s in steps),
        )


@dataclass(frozen=True)
class Parts:
    """A recipe's functions."""

    space: Space
    method: Method
    before: tuple[Callable[[LowRank], LowRank], ...]
    after: tuple[Callable[[Matrix], Matrix], ...]
    linear: bool = False
    alone: Parts | None = None


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file: the recipe, and the adapters and base it names."""

    recipe: Recipe
    models: tuple[str, ...] = ()
    base_model: str | None = None


_ALIASES = {"task_arithmetic": "sum", "linear": "sum", "dare_linear": "dare"}


def read_recipe(path: str | Path) -> RecipeFile:
    """Read a YAML recipe in mergekit's spelling.

    Keys: ``merge_method``, ``models`` (each ``model`` and ``parameters.weight``), ``parameters`` (the method's, and
    ``normalize``, ``lambda``), ``base_model``, ``dtype`` or ``out_dtype``; ours beside them: ``space``, ``steps``,
    ``basis``, ``scale``, ``rank``, ``seed``, ``extras``, ``allow_disjoint``. mergekit's ``task_arithmetic``, ``linear``
    (normalised, as there) and ``dare_linear`` are understood.

    Raises:
        SourceError: the file cannot be read.
        ConfigError: not YAML, or a key or value that means nothing here.
    """
    path = Path(path)
    data = read_mapping(path, "a recipe")
    try:
        return recipe_from(data)
    except ConfigError as error:
        raise ConfigError(str(error), file=path) from None


def recipe_from(data: Mapping[str, Any]) -> RecipeFile:
    """A recipe from what its file says: see :func:`read_recipe`.

    Raises:
        ConfigError: a key or value that means nothing.
    """
    data = {str(key): value for key, value in data.items()}
    base = data.pop("base_model", None)
    models, weights = _models(data.pop("models", None))
    values = read_values(data)
    if weights is not None:
        values["weights"] = weights
    return RecipeFile(Recipe(**values), models, None if base is None else str(base))


def read_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of :class:`Recipe` from a recipe file's keys, without those that name models.

    Raises:
        ConfigError: an unknown key.
    """
    data = dict(data)
    parameters = data.pop("parameters", None) or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError("must be a mapping", key="parameters", value=parameters)
    parameters = dict(parameters)
    method = data.pop("merge_method", data.pop("method", None))
    values: dict[str, Any] = {key: data.pop(key) for key in list(data) if key in Recipe.model_fields}
    if "out_dtype" in data:
        values["dtype"] = data.pop("out_dtype")
    if data:
        known = [
            "merge_method",
            "models",
            "base_model",
            "out_dtype",
            *(k for k in Recipe.model_fields if k not in {"method", "weights"}),
        ]
        raise ConfigError("an unknown key", key=next(iter(data)), remedy=f"Known: {', '.join(known)}")
    if "normalize" in parameters:
        values["normalize"] = parameters.pop("normalize")
    elif method == "linear":
        values["normalize"] = True
    if "lambda" in parameters:
        values["scale"] = parameters.pop("lambda")
    if method is not None:
        values["method"] = _ALIASES.get(str(method), str(method))
    if parameters or method is not None:
        values["parameters"] = parameters
    return values


def _models(entries: object) -> tuple[tuple[str, ...], list[float] | None]:
    if entries is None:
        return (), None
    if not isinstance(entries, list):
        raise ConfigError("must be a list", key="models", value=entries)
    names, weights = [], []
    for entry in ({"model": e} if isinstance(e, str) else e for e in entries):
        if not isinstance(entry, dict) or "model" not in entry or set(entry) - {"model", "parameters"}:
            raise ConfigError("each entry is a 'model' with optional 'parameters'", key="models", value=entry)
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, dict) or set(parameters) - {"weight"}:
            raise ConfigError(
                "only 'weight' can differ between adapters",
                key="models.parameters",
                value=parameters,
                remedy="Put the other parameters under the top-level 'parameters'",
            )
        names.append(str(entry["model"]))
        weights.append(parameters.get("weight"))
    if all(w is None for w in weights):
        return tuple(names), None
    return tuple(names), [1.0 if w is None else w for w in weights]


WRITTEN_APART = {"method", "parameters", "steps", "weights", "space", "scale"}


def write_recipe(recipe: Recipe, models: Sequence[str] = (), base_model: str | None = None) -> str:
    """``recipe`` as YAML that :func:`read_recipe` reads back."""
    data = recipe.model_dump(mode="json", exclude_defaults=True, exclude=WRITTEN_APART)
    head: dict[str, Any] = {"merge_method": recipe.method}
    weights = recipe.weights
    parameters = dict(recipe.parameters)
    if data.pop("normalize", False):
        parameters["normalize"] = True
    if models:
        if isinstance(weights, Mapping) or weights is None:
            head["models"] = [{"model": m} for m in models]
        else:
            head["models"] = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    if isinstance(weights, Mapping):
        data["weights"] = recipe.model_dump(mode="json")["weights"]
    elif weights is not None and not models:
        data["weights"] = list(weights)
    if base_model:
        head["base_model"] = base_model
    if parameters:
        head["parameters"] = parameters
    head["steps"] = [step if isinstance(step, str) else dict(step) for step in recipe.steps]
    head.update(space=recipe.model_dump(mode="json")["space"], scale=recipe.scale, **data)
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
