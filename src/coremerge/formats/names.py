"""Names as the base model has them: without what training put around its modules.

PEFT looks for ``base_model.model.`` and then the module's path in the base. Compilers, FSDP, DDP, checkpointing and
trainers wrap modules, and their words stay in the keys that a hand-made saver writes; PEFT then finds nothing, and
loads an adapter of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "base_model.model."
_ROOT = ("base_model", "model")
_WRAPPER = r"_(?:\w+_)?(?:orig_mod|wrapped_mod|wrapped_module)|_\w+_module"
_IS_WRAPPER = re.compile(_WRAPPER)
_WHOLE = ("module", "_module")
"""What DDP, DeepSpeed and Opacus call a whole model; deeper down a module may be called so by its own model."""

_HOLDERS = (
    "model", "pretrained_model", "peft_model", "lora_model", "wrapped_model", "net", "network", "policy", "actor",
    "student", "policy_model", "actor_model", "lit_model", "unet",
)  # fmt: skip
"""What Lightning modules, TRL's value heads, trainers and pipelines call the whole model that PEFT wrapped."""

_LIBRARIES = (
    "transformers", "transformers_modules", "peft", "torch", "diffusers", "sentence_transformers", "trl", "unsloth",
    "accelerate", "deepspeed", "lightning", "pytorch_lightning", "fairscale", "colossalai", "megatron", "opacus",
)  # fmt: skip
_MAPPED = ("rank_pattern", "alpha_pattern", "trainable_token_indices")
_LISTED = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")


@dataclass
class Names:
    """From stored keys, and from what a config says of modules, to the base model's own names.

    Args:
        keys: all keys of a file.
        config: the adapter's config. A base class from outside the usual libraries may itself have modules called
            ``base_model`` and ``module``: they are kept.
    """

    keys: Iterable[str]
    config: Mapping[str, Any]
    _seen: dict[str, None] = field(default_factory=dict)
    _changed: int = 0

    moved: bool = field(default=False, init=False)
    """Whether a part of the base was adapted by itself, and the names given are those of the whole."""

    def __post_init__(self) -> None:
        mapping = self.config.get("auto_mapping")
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        self._own = isinstance(library, str) and library.partition(".")[0] not in _LIBRARIES
        paths = [steps[at + 2 :] for steps in map(_steps, self.keys) if (at := _root(steps)) is not None]
        self._own |= any(_holds_base_model(path) for path in paths)
        self._twice = not self._own and any(_root(path) is not None for path in paths)
        inside = [path for _, path in map(self._split, self.keys) if len(path) > 2 and "base_model" not in path[:2]]
        self._wrapped = not self._own and bool(inside) and all(path[0] in _WHOLE for path in inside)

    def __call__(self, key: str) -> str:
        """The name of stored ``key``, its part (``lora_A.weight``) included."""
        seen: list[str] = []
        before, path = self._split(key, seen)
        while self._wrapped and len(path) > 1 and path[0] in _WHOLE:
            seen.append(f"without {path.pop(0)}")
        if before:
            seen.append(f"with {'.'.join(before)} inside the prefix {PREFIX}, where PEFT looks for it")
        self._seen |= dict.fromkeys(seen)
        self._changed += bool(seen)
        return ".".join([*before, *path])

    @property
    def notes(self) -> list[str]:
        """What was changed in the names that were asked for, in plain words."""
        if not self._changed:
            return []
        return [f"{self._changed} keys read under the base model's own names: {', '.join(self._seen)}"]

    def settings(self) -> Mapping[str, Any]:
        """The config with its names of modules, and patterns of names, as the names are read."""
        changed = {key: self._renamed(self.config[key]) for key in (*_MAPPED, *_LISTED) if self.config.get(key)}
        return {**self.config, **changed}

    def _split(self, key: str, seen: list[str] | None = None) -> tuple[list[str], list[str]]:
        """What stands before the prefix, and the path after it, both without wrappers."""
        said = [] if seen is None else seen
        steps = _steps(key)
        said += [f"without {step}" for step in key.split(".") if _IS_WRAPPER.fullmatch(step)]
        at = _root(steps)
        if at is None:
            return [], steps
        before, path = steps[:at], steps[at + 2 :]
        whole = [step for step in before if step in (*_WHOLE, "base_model")]
        said += [f"without {step}" for step in whole]
        before = [step for step in before if step not in whole]
        if len(before) == 1 and before[0] in _HOLDERS:
            said.append(f"without {before.pop()} before the prefix {PREFIX}")
        self.moved |= bool(before)
        while self._twice and (again := _root(path)) is not None:
            said.append(f"with the prefix {PREFIX} once")
            self.moved |= bool(again)
            path = path[:again] + path[again + 2 :]
        return before, path

    def _renamed(self, value: object) -> object:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self._text(item) if isinstance(item, str) else item for item in value]
        if isinstance(value, dict):
            found: dict[str, object] = {}
            for key, item in value.items():
                found.setdefault(self._text(key), item)
            return found
        return value

    def _text(self, text: str) -> str:
        """A name or a regular expression of names, whose dots may be escaped."""
        text = re.sub(rf"(?<!\w)(?:{_WRAPPER})\\?\.", "", text)
        text = re.sub(rf"\\?\.(?:{_WRAPPER})(?!\w)", "", text)
        if self._twice:
            text = re.sub(r"(?<!\w)base_model\\?\.model\\?\.", "", text)
        return re.sub(rf"^(\^?)(?:(?:{'|'.join(_WHOLE)})\\?\.)+", r"\1", text) if self._wrapped else text


def _steps(key: str) -> list[str]:
    return [step for step in key.split(".") if not _IS_WRAPPER.fullmatch(step)]


def _holds_base_model(path: list[str]) -> bool:
    """Whether the base itself has a module called so: something other than ``model``, or VeRA's A and B, is in it."""
    return path[:1] == ["base_model"] and len(path) > 2 and path[1] != "model" and "vera_" not in path[1]


def _root(steps: list[str]) -> int | None:
    """Where the prefix begins among ``steps``."""
    return next((i for i in range(len(steps) - 1) if (steps[i], steps[i + 1]) == _ROOT), None)
