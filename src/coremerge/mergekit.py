"""mergekit's recipes in our terms: what a model's own parameters, and its names of methods, come to here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coremerge.errors import ConfigError
from coremerge.yamlfile import text_of

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "task_arithmetic": ("sum", {}),
    "linear": ("sum", {}),
    "dare_linear": ("dare", {}),
    "magnitude_prune": ("magnitude", {}),
    "breadcrumbs_ties": ("breadcrumbs", {"elect": True}),
    "della_linear": ("della", {"elect": False}),
}
"""mergekit's and PEFT's name → ours, and the parameters that make it so."""

SUMS = ("linear", "task_arithmetic")
"""Whose weights are strengths: a scale of our choice would change what they say."""

DARE: Mapping[str, Mapping[str, Any]] = {"dare": {}, "dare_linear": {}, "dare_ties": {"density": 1.0}}
"""Methods whose density is what DARE keeps → what else that leaves; nothing is trimmed afterwards."""

RESCALED = (*DARE, "della", "della_linear")

IGNORED = ("tokenizer_source", "tokenizer", "chat_template", "name")
"""Of a whole model's files."""

IGNORED_PARAMETERS = ("int8_mask",)
"""Of how mergekit computes."""

OF_MODELS = ("density", "gamma", "epsilon", "drop_rate")
"""Parameters of methods that may be said of each model."""

Translated = tuple[dict[str, Any], tuple[str, ...], str | None, tuple[str, ...]]
"""A recipe's keys without those that name models, the models, the base, and what was made of it, in plain words."""


def translated(data: Mapping[str, Any]) -> Translated:
    """A recipe file's keys, see :func:`coremerge.recipe.read_recipe`, with what is said of single models in lists.

    Raises:
        ConfigError: models that are none, parameters of some of them alone.
    """
    found, notes = dict(data), list[str]()
    if "slices" in found:
        raise ConfigError(
            "slices stack layers of models, which adapters cannot", key="slices", value=found["slices"],
            remedy="Give models; a weight may be a gradient over the layers, as [0, 0.5, 1]",
        )  # fmt: skip
    base = found.pop("base_model", None)
    base = None if base is None else str(text_of(base))
    parameters = _mapping(found.get("parameters"), "parameters")
    models, own, beside = _models(found.pop("models", None), base)
    if beside is not None:
        notes.append(f"{base} is the base model, which every adapter stands on: left out of the models")
    shared = parameters.pop("weight", None)
    if shared is not None and models:
        own.setdefault("weight", [None] * len(models))
    for key, value in parameters.items():
        if models and key in OF_MODELS and isinstance(value, (list, Mapping)):
            own.setdefault(key, [None] * len(models))  # a gradient or conditions, for all of them
    for key, values in own.items():
        told = [_or_else(value, shared if key == "weight" else parameters.get(key)) for value in values]
        if key == "weight":
            weights = [1.0 if value is None else value for value in told]
            say_once(found, "weights", weights, "models.parameters.weight")
        else:
            parameters[key] = _of_models(key, told)
    if shared is not None and not models:
        _scaled(found, parameters, shared)
    if beside is not None and found.get("merge_method") == "linear" and parameters.get("normalize", True) is True:
        _beside_base(found, parameters, beside, len(models))
    _ignore(found, IGNORED, notes)
    _ignore(parameters, IGNORED_PARAMETERS, notes)
    _of_method(str(found.get("merge_method")), found, parameters, notes)
    if parameters or "parameters" in found:
        found["parameters"] = parameters
    return found, models, base, tuple(notes)


def _mapping(value: object, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError("must be a mapping", key=key, value=value)
    return dict(value or {})


Models = tuple[tuple[str, ...], dict[str, list[Any]], dict[str, Any] | None]


def _models(entries: object, base: str | None) -> Models:
    """The adapters' names, parameter → what each of them says, or None, and what the base says if it is among them."""
    if entries is None:
        return (), {}, None
    if not isinstance(entries, list):
        raise ConfigError("must be a list", key="models", value=entries)
    listed: list[tuple[str, dict[str, Any]]] = []
    for entry in ({"model": e} if isinstance(e, str) else e for e in map(text_of, entries)):
        if not isinstance(entry, dict) or entry.get("model") is None or set(entry) - {"model", "parameters"}:
            raise ConfigError(
                "each entry is a 'model' with optional 'parameters'", key="models", value=entry,
                remedy="Quote a name such as 'null'" if entry is None or entry == {"model": None} else None,
            )  # fmt: skip
        if isinstance(entry["model"], (Mapping, list)):
            raise ConfigError("a model is one name", key="models.model", value=entry["model"])
        listed.append((str(text_of(entry["model"])), _mapping(entry.get("parameters"), "models.parameters")))
    kept = [(name, own) for name, own in listed if name != base] or listed
    beside = next((own for name, own in listed if name == base), {}) if len(kept) < len(listed) else None
    keys = dict.fromkeys(key for _, own in kept for key in own)
    return tuple(name for name, _ in kept), {key: [own.get(key) for _, own in kept] for key in keys}, beside


def _or_else(value: Any, shared: Any) -> Any:
    """What a model says, and where none of its conditions fits, what is said for all; a single condition as a list."""
    if value is None:
        return [shared] if isinstance(shared, Mapping) else shared
    conditions = [value] if isinstance(value, Mapping) else value
    if shared is None or not (isinstance(conditions, list) and any(isinstance(one, Mapping) for one in conditions)):
        return conditions
    more = shared if isinstance(shared, list) and any(isinstance(one, Mapping) for one in shared) else [shared]
    return [*conditions, *(one if isinstance(one, Mapping) else {"value": one} for one in more)]


def _scaled(found: dict[str, Any], parameters: dict[str, Any], weight: Any) -> None:
    """A weight for all adapters, whoever they are, is a factor of the scale; of one that is set from norms, none."""
    number = _number(weight)
    if number is None:
        raise ConfigError(
            "a weight for all adapters must be a number where no models are named", key="parameters.weight",
            value=weight, remedy="List the models",
        )  # fmt: skip
    method = str(found.get("merge_method"))
    for place, key in ((found, "scale"), (parameters, "lambda")):
        if key in place and (known := _number(place[key])) is not None:
            place[key] = known * number
            return
    if method == "task_arithmetic":
        found["scale"] = number


def _beside_base(found: dict[str, Any], parameters: dict[str, Any], base: dict[str, Any], count: int) -> None:
    """``linear`` divides by the sum of all weights, the base's among them, whose own update is zero."""
    given = [_number(value) for value in (base.get("weight", 1), *found.get("weights", [1.0] * count))]
    if any(value is None for value in given):
        raise ConfigError(
            "a linear merge beside the base needs a number as the weight of each", key="models.parameters.weight",
            value=[base.get("weight", 1), *found.get("weights", [])], remedy="Leave the base out of the models",
        )  # fmt: skip
    numbers = [value for value in given if value is not None]
    if not sum(numbers):
        raise ConfigError("weights that sum to zero cannot be normalised", key="weights", value=numbers)
    found["weights"] = [value / sum(numbers) for value in numbers[1:]]
    parameters["normalize"] = False


def _number(value: Any) -> float | None:
    """What is a number, also as YAML leaves it where its text would be lost (0.70)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _of_models(key: str, values: list[Any]) -> Any:
    """A parameter of the method, from what each model says: one value where they agree."""
    if any(value is None for value in values):
        raise ConfigError(
            "some models have it, others do not", key=f"models.parameters.{key}", value=values,
            remedy="Give it to all of them, or under the top-level parameters for the others",
        )  # fmt: skip
    same = all(value == values[0] for value in values) and not isinstance(values[0], (list, Mapping))
    return values[0] if same else values


def _ignore(values: dict[str, Any], keys: tuple[str, ...], notes: list[str]) -> None:
    for key in keys:
        if key in values:
            del values[key]
            notes.append(f"{key} of the recipe means nothing for adapters: ignored")


def _of_method(method: str, found: dict[str, Any], parameters: dict[str, Any], notes: list[str]) -> None:
    """What mergekit means where it says something else by the same words."""
    if "rescale" in parameters and str(parameters.pop("rescale")).lower() != str(method in RESCALED).lower():
        raise ConfigError(
            f"what {method} keeps is {'always' if method in RESCALED else 'never'} rescaled here",
            key="parameters.rescale", remedy="Leave it out",
        )  # fmt: skip
    if method in DARE and "density" in parameters and "drop_rate" not in parameters:
        kept = parameters.pop("density")
        parameters["drop_rate"] = _rest(kept)
        parameters |= DARE[method]
        notes.append(f"density is what {method} keeps, as in mergekit: a drop_rate of 1 - density")
    if method in SUMS and "scale" not in found and "lambda" not in parameters:
        found["scale"] = 1.0
        notes.append(
            f"{method} without a scale is mergekit's: the scale is 1; write scale: auto to have it set from norms"
        )


def _rest(density: Any) -> Any:
    """The share that is not kept; what is no number is refused where parameters are read."""
    if isinstance(density, list):
        return [_rest(one) for one in density]
    if isinstance(density, Mapping):
        return {key: _rest(value) if key == "value" else value for key, value in density.items()}
    number = _number(density)
    return density if number is None else round(1 - number, 12)


def say_once(values: dict[str, Any], key: str, value: object, name: str) -> None:
    """Take ``value``, which the file gives as ``name``; the file may say it as ``key``, too, but not otherwise.

    Raises:
        ConfigError: it does.
    """
    if values.get(key) not in (None, value):
        raise ConfigError(f"{key} is {values[key]!r} in the same file", key=name, value=value, remedy="Say it once")
    values[key] = value
