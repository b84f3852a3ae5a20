"""What to do: a validated recipe, from keywords, the command line or a YAML file in mergekit's spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from coremerge.errors import ConfigError
from coremerge.layered import Layered
from coremerge.registry import Operator, Spec
from coremerge.yamlfile import NO_TRUTH, NameText, Number, Whole, read_mapping, text_of

if TYPE_CHECKING:
    from coremerge.lowrank import LowRank
    from coremerge.methods import Method
    from coremerge.spaces import Space
    from coremerge.steps import After, Beside, Step

Dtype = Literal["float32", "float16", "bfloat16", "float64"]


_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}

_UNSAID = {"parameters", "steps"}
"""Keys that may be None, as if they were not said."""

Weight = Number | tuple[Number, ...]
"""Of a module, or of each of its rank components."""

Weights = Sequence[Number | Layered] | Mapping[str, Number | Layered | Mapping[str, Weight]]


class Recipe(BaseModel):
    """How adapters become one.

    Args:
        space: ``core`` (default), ``knots``, ``full`` or ``ctm``; with parameters as ``"ctm:rank=8"``.
        method: a name of ``coremerge methods``.
        parameters: the method's.
        steps: applied in order: those that act on updates before the method, the others on its result.
        norms: ``"equal"`` brings all adapters to one size before anything else, see :mod:`coremerge.equal`; ``"own"``
            leaves them as they are. Equal for the default method, own for a method that is named.
        basis: of the core space: ``stacked`` or ``balanced``.
        weights: None (all one), a number per adapter in order, a mapping of names to numbers, or a mapping of names to
            mappings of module names to numbers (a module that is not listed counts as 1) or to one number per rank
            component; what :func:`coremerge.learning.learn_weights` returns. Adapters that come in a sequence and have
            none of the names are matched by order. In place of an adapter's number also mergekit's gradient over the
            layers (``[0, 0.5, 1]``) or conditions (``[{"filter": "mlp", "value": 0.5}, {"value": 1}]``).
        normalize: divide the weights by their sum, per module.
        scale: the one factor of the whole merge; ``"auto"`` sets it from norms: see
            :func:`coremerge.outcome.auto_scale`; ``"base"`` does so, too, but holds it to what the base model bears:
            see :func:`coremerge.outcome.base_scale`.
        rank: of the output: a number, ``"exact"``, or None: the default, exact.
        seed: for methods that draw random masks.
        dtype: of the output; by default the inputs' own.
        extras: what to do where several adapters carry different whole tensors (``modules_to_save``, token rows):
            None refuses; ``"average"``, ``"drop"``, or the name of the adapter to take them from.
        allow_disjoint: merge adapters none of whose modules coincide.

    Parameters are kept as validated: ``Recipe(method="tsv", parameters={"rank": "4"})`` has the number 4.

    Raises:
        ConfigError: a key or a value that means nothing.

    Example:
        >>> Recipe().method, Recipe().norms
        ('whiten', 'equal')
        >>> Recipe(method="ties").norms
        'own'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Spec = "core"
    method: str = "whiten"
    parameters: dict[str, Any] = Field(default_factory=dict)
    steps: list[Spec] = Field(default_factory=list)
    norms: Literal["equal", "own"] = "own"
    basis: Literal["stacked", "balanced"] = "stacked"
    weights: Weights | None = None
    normalize: bool = False
    scale: Annotated[float, Field(allow_inf_nan=False), NO_TRUTH] | Literal["auto", "base"] = "auto"
    rank: Annotated[int, Field(ge=1), NO_TRUTH] | Literal["exact"] | None = None
    seed: Whole = 0
    dtype: Dtype | None = None
    extras: NameText | None = None
    allow_disjoint: bool = False

    def __init__(self, **values: Any) -> None:
        said = values.get("norms") is not None
        norms = values.get("norms") or ("own" if "method" in values else "equal")
        values = {key: value for key, value in values.items() if value is not None or key not in _UNSAID}
        values["norms"] = norms
        try:
            super().__init__(**values)
        except ValidationError as error:
            detail = max(error.errors(), key=lambda one: len(one["loc"]))  # of several forms, the one it was meant as
            raise ConfigError(
                detail["msg"].removeprefix("Value error, "),
                key=".".join(map(str, detail["loc"][:1])),
                value=detail["input"],
                remedy=f"A recipe takes: {', '.join(type(self).model_fields)}"
                if detail["type"] == "extra_forbidden"
                else None,
            ) from None
        if not said:  # whoever names another method leaves them to that
            self.model_fields_set.discard("norms")

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

    @field_validator("space")
    @classmethod
    def _known_space(cls, value: Spec) -> Spec:
        from coremerge.spaces import SPACES

        return SPACES.canonical(value)

    @field_validator("parameters")
    @classmethod
    def _validated(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from coremerge.methods import METHODS

        return METHODS[info.data["method"]].validated(value) if "method" in info.data else value

    @field_validator("steps")
    @classmethod
    def _known_steps(cls, value: list[Spec]) -> list[Spec]:
        from coremerge.steps import STEPS

        return [STEPS.canonical(step) for step in value]

    @model_validator(mode="after")
    def _can_be_made(self) -> Recipe:
        self.parts()
        return self

    def but(self, **changes: Any) -> Recipe:
        """This recipe with ``changes``, for the same method.

        Example:
            >>> Recipe().but(seed=3).norms
            'equal'
        """
        return Recipe(**{key: value for key, value in self if key in self.model_fields_set} | changes)

    def settled(self, adapters: Mapping[str, Any]) -> tuple[Recipe, dict[str, str]]:
        """With what its method leaves to the ``adapters``, by name: the recipe, and parameter → why it is so."""
        from coremerge.methods import METHODS

        method = METHODS.resolve({self.method: self.parameters})
        found = {key: choose(adapters) for key, choose in method.entry.settles.items() if method.values[key] is None}
        if not found:
            return self, {}
        parameters = {**self.parameters, **{key: value for key, (value, _) in found.items()}}
        said = {key: f"{text_of(value)}, {why}" for key, (value, why) in found.items()}
        return self.model_copy(update={"parameters": parameters}), said

    def check_count(self, count: int) -> None:
        """Refuse a parameter that has another number of values than there are adapters.

        Raises:
            ConfigError: it has.
        """
        for key, value in self.parameters.items():
            if isinstance(value, tuple) and len(value) != count:
                raise ConfigError(f"{len(value)} values for {count} adapters", key=key, value=list(value))

    def resolve(self) -> Resolved:
        """Its operators with validated parameters, and what they declare of themselves.

        Raises:
            ConfigError: an unknown name or parameter.
        """
        from coremerge.methods import METHODS
        from coremerge.spaces import SPACES
        from coremerge.steps import STEPS

        space, method = SPACES.resolve(self.space), METHODS.resolve({self.method: self.parameters})
        steps = tuple(STEPS.resolve(step) for step in self.steps)
        settings = {
            "basis": self.basis,
            "singular": not (method.entry.unitary and all(step.entry.unitary for step in steps)),
        }
        taken = {key: value for key, value in settings.items() if key in space.entry.parameters}
        neutral = method.entry.neutral
        if neutral.keys() & self.parameters.keys():
            return Resolved(space, method, steps, taken)
        alone = Operator(method.entry, {**method.given, **neutral})
        return Resolved(space, method, steps, taken, Resolved(space, alone, steps, taken))

    def parts(self) -> Parts:
        """The recipe's functions: see :meth:`resolve`."""
        return self.resolve().parts()


@dataclass(frozen=True)
class Resolved:
    """A recipe's operators, with validated parameters.

    Attributes:
        steps: in their order, before and after.
        settings: of the space, where it does not say otherwise: those of the whole recipe that it takes.
        alone: what it comes to where there is one update to merge: what a person did not name leaves that as it is.
            None: the person named what acts on a single update, too.
    """

    space: Operator[Space]
    method: Operator[Method]
    steps: tuple[Operator[Step], ...]
    settings: Mapping[str, Any]
    alone: Resolved | None = None

    @property
    def basis(self) -> str | None:
        """Of the space; None: it has no choice of one."""
        return {**self.settings, **self.space.given}.get("basis")

    @property
    def idle(self) -> tuple[Operator[Any], ...]:
        """The operators that do not act where there is one update to merge: see :attr:`alone`."""
        return () if self.alone is None or self.alone.method.values == self.method.values else (self.method,)

    @property
    def dense(self) -> bool:
        """Whether a method or step works on all entries of cores."""
        return self.copies > 0 or any(step.dense for step in self.steps)

    @property
    def copies(self) -> float:
        """How many matrices of all entries of cores the space and the method hold for each of the inputs."""
        return self.method.copies + self.space.copies

    @property
    def is_full(self) -> bool:
        """Whether cores are as large as the updates, or a step works on all entries of these."""
        return self.space.entry.shape is None or any(step.dense for step in self.lifted)

    def core_shape(self, summed: int, update: tuple[int, int]) -> tuple[int, int]:
        """The most that is worked on at once, for adapters of ``summed`` ranks and an ``update`` (m, n)."""
        return update if self.is_full else self._shape(summed, update)

    def _shape(self, summed: int, update: tuple[int, int]) -> tuple[int, int]:
        shape = self.space.entry.shape
        return update if shape is None else shape(summed, update)

    def rank(self, ranks: Iterable[int], update: tuple[int, int]) -> int:
        """The most that the merge of updates (m, n) of these ranks can have, before it is cut to the recipe's."""
        ranks = [_bound(self.before, rank, min(update)) for rank in ranks]
        largest = min(*update, *self._shape(sum(ranks), update))
        largest = largest if self.space.keeps is None else min(largest, self.space.keeps)
        kept = ranks if self.method.keeps is None else [min(rank, self.method.keeps) for rank in ranks]
        rank = largest if self.method.spreads else min(largest, sum(kept))
        lifted = self.lifted
        rank = _bound(self.after[: len(self.after) - len(lifted)], rank, largest)
        return _bound(lifted, rank, min(update))

    @cached_property
    def before(self) -> tuple[Operator[Step], ...]:
        """The steps that act on updates."""
        from coremerge.steps import Before

        return tuple(step for step in self.steps if isinstance(step.make(), Before))

    @cached_property
    def after(self) -> tuple[Operator[Step], ...]:
        """The steps that act on the method's result."""
        return tuple(step for step in self.steps if step not in self.before)

    @property
    def lifted(self) -> tuple[Operator[Step], ...]:
        """Those of :attr:`after` that act in weight space."""
        from coremerge.steps import Lift

        found = [i for i, step in enumerate(self.after) if isinstance(step.make(), Lift)]
        return self.after[found[0] :] if found else ()

    def parts(self) -> Parts:
        """The functions."""
        from coremerge.steps import After, Before, Beside, Lift

        steps = [step.make() for step in self.steps]
        named = [(step, of) for step, of in zip(steps, self.steps, strict=True) if isinstance(step, After | Beside)]
        acting = [step for step, _ in named]
        first = len(acting) - sum(not isinstance(of.make(), Lift) for of in self.lifted)
        return Parts(
            self.space.entry.make({**self.settings, **self.space.given}),
            self.method.make(),
            tuple(s.apply for s in steps if isinstance(s, Before)),
            tuple(acting[:first]),
            tuple(acting[first:]),
            linear=self.method.entry.linear and not any(step.entry.lifts for step in self.after),
            alone=None if self.alone is None else self.alone.parts(),
            scaling=tuple(step for step, of in named if of.entry.linear),
        )


def _bound(steps: Iterable[Operator[Step]], rank: int, largest: int) -> int:
    """The most that a rank can be after ``steps``."""
    for step in steps:
        rank = largest if step.spreads else rank
        rank = rank if step.keeps is None else min(rank, step.keeps)
    return rank


@dataclass(frozen=True)
class Parts:
    """A recipe's functions.

    Attributes:
        after: applied to the merged core.
        lifted: applied then, in weight space.
        linear: the whole is a weighted sum, in which even directions count that are rounding errors.
        alone: see :attr:`Resolved.alone`.
        scaling: of the steps after the method, those that are linear.
    """

    space: Space
    method: Method
    before: tuple[Callable[[LowRank], LowRank], ...]
    after: tuple[After | Beside, ...]
    lifted: tuple[After | Beside, ...] = ()
    linear: bool = False
    alone: Parts | None = None
    scaling: tuple[After | Beside, ...] = ()


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file: the recipe, the adapters and base it names, and what was made of it, in plain words."""

    recipe: Recipe
    models: tuple[str, ...] = ()
    base_model: str | None = None
    notes: tuple[str, ...] = ()


def read_recipe(path: str | Path) -> RecipeFile:
    """Read a YAML recipe in mergekit's spelling.

    Keys: ``merge_method``, ``models`` (each ``model`` and its ``parameters``: ``weight``, a number, a gradient or
    conditions, and the method's own), ``parameters`` (the method's, and ``weight``, ``normalize``, ``lambda``),
    ``base_model``, ``dtype`` or ``out_dtype``; ours beside them: ``space``, ``steps``, ``norms``, ``basis``, ``scale``,
    ``rank``, ``seed``, ``extras``, ``allow_disjoint``. mergekit's ``task_arithmetic``, ``linear`` (normalised, as
    there; both at scale 1), ``dare_linear``, ``breadcrumbs_ties``, ``della_linear`` and PEFT's ``magnitude_prune`` are
    understood. Its ``density`` of DARE is the share that is kept; the base among its models is left out, and so are
    what concerns a model's memory and tokenizer.

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
    from coremerge.mergekit import translated

    found, models, base, notes = translated({str(key): value for key, value in data.items()})
    return RecipeFile(Recipe(**read_values(found)), models, base, notes)


def read_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of :class:`Recipe` from a recipe file's keys, without those that name models.

    Raises:
        ConfigError: an unknown key.
    """
    from coremerge.mergekit import ALIASES, say_once

    data = dict(data)
    parameters = data.pop("parameters", None) or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError("must be a mapping", key="parameters", value=parameters)
    parameters = dict(parameters)
    values: dict[str, Any] = {key: data.pop(key) for key in list(data) if key in Recipe.model_fields}
    if "merge_method" in data:
        say_once(values, "method", data.pop("merge_method"), "merge_method")
    method = values.pop("method", None)
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
        say_once(values, "normalize", parameters.pop("normalize"), "parameters.normalize")
    elif method == "linear":
        values["normalize"] = True
    if "lambda" in parameters:
        say_once(values, "scale", parameters.pop("lambda"), "parameters.lambda")
    if method is not None:
        values["method"], settled = ALIASES.get(str(method), (str(method), {}))
        for key, value in settled.items():
            say_once(parameters, key, value, f"{method}: {key}")
    if parameters or method is not None:
        values["parameters"] = parameters
    return values


WRITTEN_APART = {"method", "parameters", "steps", "weights", "space", "scale"}


WHOLE = {"dare_ties"}
"""Methods whose parameters are all written: mergekit means something else by one of them alone."""


def write_recipe(recipe: Recipe, models: Sequence[str] = (), base_model: str | None = None) -> str:
    """``recipe`` as YAML that :func:`read_recipe` reads back."""
    data = recipe.model_dump(mode="json", exclude_defaults=True, exclude=WRITTEN_APART)
    plain = recipe.model_dump(mode="json")
    head: dict[str, Any] = {"merge_method": recipe.method}
    weights = plain["weights"]
    parameters = plain["parameters"]
    if recipe.method in WHOLE:
        parameters = {**recipe.resolve().method.values, **parameters}
    each = {key: parameters.pop(key) for key, value in recipe.parameters.items() if models and isinstance(value, tuple)}
    if models and isinstance(weights, list):
        each = {"weight": weights, **each}
    elif weights is not None:
        data["weights"] = weights
    if data.pop("normalize", False):
        parameters["normalize"] = True
    if models:
        own = [{key: values[at] for key, values in each.items()} for at in range(len(models))]
        head["models"] = [{"model": m, **({"parameters": o} if o else {})} for m, o in zip(models, own, strict=True)]
    if base_model:
        head["base_model"] = base_model
    if parameters:
        head["parameters"] = parameters
    head["steps"] = [step if isinstance(step, str) else dict(step) for step in recipe.steps]
    head.update(space=plain["space"], scale=recipe.scale, **data)
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
