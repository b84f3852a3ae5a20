"""``adapter_config.json``: strict JSON, lenient keys, and the settings that change the maths."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coremerge.errors import ConfigError, SourceError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
LFS_MARK = b"version https://git-lfs.github.com/spec/"
LFS_REMEDY = "Fetch the real file: git lfs pull, or download it again through the hub"
_LIMIT = 64 * 2**20  # bytes: the index of the largest models has some 10 MB
_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INIT = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_CONVERT = "Convert it to LoRA with peft.save_as_lora, with its base model at hand, and merge that"


@dataclass(frozen=True)
class Config:
    """A parsed ``adapter_config.json``; a missing or null key is PEFT's default.

    Attributes:
        path: the file, for messages.
        raw: everything it says.
    """

    path: Path
    raw: Mapping[str, Any]

    @property
    def type(self) -> str:
        """PEFT's adapter type in capitals."""
        return self.text("peft_type", "").upper()

    def wrong(self, key: str, what: str, remedy: str | None = None) -> ConfigError:
        """The error that says what is wrong with ``key``."""
        return ConfigError(what, file=self.path, key=key, value=self.raw.get(key), remedy=remedy)

    def given(self, key: str) -> bool:
        """Whether ``key`` is set to anything but null, false or an empty value."""
        return bool(self.raw.get(key))

    def text(self, key: str, default: str) -> str:
        """A string."""
        return self.optional_text(key) or default

    def optional_text(self, key: str) -> str | None:
        """A string or None."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value or None
        raise self.wrong(key, "must be a string or null", f"Correct {key} in the config")

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        raise self.wrong(key, "must be true or false", f"Correct {key} in the config")

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.raw.get(key)
        return default if value is None else as_number(self, key, value)

    def integer(self, key: str, default: int) -> int:
        """A whole number, at least 0."""
        value = self.raw.get(key)
        return default if value is None else as_integer(self, key, value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or one string."""
        value = self.raw.get(key)
        if value is None:
            return ()
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise self.wrong(key, "must be a list of names or null", f"Correct {key} in the config")
        return tuple(dict.fromkeys(listed))

    def table(self, key: str) -> Mapping[str, Any]:
        """An object; empty where it is null."""
        value = self.raw.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        raise self.wrong(key, "must be an object or null", f"Correct {key} in the config")

    @property
    def layer_replication(self) -> tuple[tuple[int, int], ...] | None:
        """PEFT's layer ranges [start, end), or None."""
        value = self.raw.get("layer_replication")
        if not value:
            return None
        try:
            return tuple((int(start), int(end)) for start, end in value)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(
                "layer_replication", "must be a list of [start, end] pairs", "Correct layer_replication in the config"
            ) from None


def as_number(config: Config, key: str, value: object) -> float:
    """``value`` as a finite float; ``key`` is where it was found."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigError(
        "must be a finite number", file=config.path, key=key, value=value, remedy=f"Correct {key} in the config"
    )


def as_integer(config: Config, key: str, value: object) -> int:
    """``value`` as a whole number of at least 0; ``key`` is where it was found."""
    number = as_number(config, key, value)
    if number != int(number) or number < 0:
        raise ConfigError(
            "must be a whole number of at least 0",
            file=config.path,
            key=key,
            value=value,
            remedy=f"Correct {key} in the config",
        )
    return int(number)


def read_config(path: Path) -> Config:
    """Read and check an ``adapter_config.json``.

    Raises:
        SourceError: the file cannot be read, or is a Git LFS pointer.
        ConfigError: it is not strict JSON, not an object, or not a PEFT config.
    """
    config = Config(path, read_json(path))
    peft_type = config.raw.get("peft_type")
    if not peft_type:
        keys = ", ".join(list(config.raw)[:8]) or "nothing"
        raise ConfigError(
            f"this is not a PEFT adapter config: it has no peft_type (keys found: {keys})",
            file=path,
            key="peft_type",
            value=peft_type,
            remedy='If this is a LoRA adapter, add "peft_type": "LORA" with its r and lora_alpha',
        )
    if not isinstance(peft_type, str):
        raise config.wrong("peft_type", "must be a string", 'Write a type such as "LORA"')
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, with an error that says what is wrong and where."""
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, text, error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not usable JSON: {error}", file=path, remedy="Save the config again") from None
    if not isinstance(value, dict):
        raise ConfigError(
            "the config must be a JSON object", file=path, value=value, remedy="Save the adapter again with PEFT"
        )
    return value


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _LIMIT:
            raise ConfigError("larger than any adapter config", file=path, value=path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", file=path) from None
    if data.startswith(LFS_MARK):
        raise SourceError("this is a Git LFS pointer, not the file itself", file=path, remedy=LFS_REMEDY)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=path, remedy="Save the config as UTF-8 JSON") from None


def _not_json(path: Path, text: str, error: json.JSONDecodeError) -> ConfigError:
    before = re.search(r'"([^"\n]*)"\s*:\s*\Z', text[max(0, error.pos - 500) : error.pos])
    key = before.group(1) if before else None
    word = re.match(r"\w+", text[error.pos : error.pos + 30])
    found = word.group() if word else text[error.pos : error.pos + 20].strip()
    place = f"line {error.lineno} column {error.colno}"
    if not text.strip():
        return ConfigError("the file is empty", file=path, remedy="Download or save the adapter again")
    if error.msg == "Extra data":
        return ConfigError(
            f"a second value follows the JSON object at {place}",
            file=path,
            value=found,
            remedy="Keep the one object that belongs to this adapter",
        )
    if found in _PYTHON_WORDS:
        return ConfigError(
            f"{found} is Python, not JSON ({place})", file=path, key=key, value=found,
            remedy=f"Write {_PYTHON_WORDS[found]}" + (' or, for peft_type, "LORA"' if key == "peft_type" else ""),
        )  # fmt: skip
    return ConfigError(
        f"not valid JSON: {error.msg} at {place}", file=path, key=key, value=found, remedy="Correct the config there"
    )


_BASE_NEEDED = "its update depends on the base model's weights"
_EXACT_LATER = "its update is low-rank but this version has no reader for it"
_FULL_RANK = "its update is of full rank, not a product of two thin factors"
_MULTIPLIES = "it multiplies weights or activations instead of adding a low-rank update"
_NO_WEIGHTS = "it adds prompts or tokens, not an update of weights"
_REASONS = {
    **dict.fromkeys(("VBLORA", "UNILORA", "DELORA", "LOHA", "LOKR", "GRALORA", "MISS", "XLORA", "POLY"), _EXACT_LATER),
    **dict.fromkeys(("TINYLORA", "PSOFT", "HIRA", "DEFT"), _BASE_NEEDED),
    **dict.fromkeys(("RANDLORA", "FOURIERFT", "WAVEFT", "C3A", "SHIRA"), _FULL_RANK),
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "PEANUT", "GLORA", "IA3", "LN_TUNING", "BONE", "OSF"), _MULTIPLIES),
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
         "CARTRIDGE", "TRAINABLE_TOKENS"),
        _NO_WEIGHTS,
    ),
}  # fmt: skip
_REASONS["XLORA"] = _REASONS["POLY"] = "its update depends on the input (routing)"
_LORA_CONVERTIBLE = frozenset(
    ("C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "SHIRA",
     "TINYLORA", "UNILORA", "VBLORA", "WAVEFT")
)  # fmt: skip


def unknown_type(config: Config, known: tuple[str, ...]) -> UnsupportedError:
    """The refusal of an adapter type that no reader here takes."""
    reason = _REASONS.get(config.type, "an adapter type this version does not know")
    remedy = _CONVERT if config.type in _LORA_CONVERTIBLE else f"Types that can be merged: {', '.join(known)}"
    return UnsupportedError(reason, file=config.path, key="peft_type", value=config.raw["peft_type"], remedy=remedy)


_UNSUPPORTED: dict[str, tuple[str, str]] = {
    "use_dora": (
        "DoRA rescales the base weights: the update is not low-rank",
        "Merge it into its base model first, or train without DoRA",
    ),
    "kasa_config": ("KaSA changes the base model's weights", "Train without KaSA, or merge it into its base model"),
    "use_qalora": (
        "QALoRA pools its inputs: the update is not a plain product",
        "Merge it into its base model first, or train without QALoRA",
    ),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", "Expand it to plain LoRA factors first"),
    "alora_invocation_tokens": (
        "aLoRA acts only on some tokens, so it cannot be part of one update",
        "Leave it out, or train it as plain LoRA",
    ),
    "arrow_config": ("Arrow routes between adapters by input", "Merge the adapters it routes between instead"),
    "monteclora_config": ("MonteCLoRA samples its factors", "Train or save it as plain LoRA"),
    "enable_lora": ("fused layers of the first LoRA library are not read", "Save the adapter again with today's PEFT"),
}


def refuse_variants(config: Config) -> None:
    """Refuse the LoRA settings whose update is not s · B A on the base model.

    Raises:
        UnsupportedError: naming the file, the key, its value and what to do.
    """
    for key, (what, remedy) in _UNSUPPORTED.items():
        value = config.raw.get(key)
        if value not in (None, False, [], ""):
            raise UnsupportedError(what, file=config.path, key=key, value=value, remedy=remedy)
    init = config.raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INIT and not changes_base(config):
        raise UnsupportedError(
            "an initialisation this version does not know: it may have changed the base model",
            file=config.path,
            key="init_lora_weights",
            value=init,
            remedy=f"If it left the base as it was, write true; known: {', '.join((*_PLAIN_INIT, *_CHANGED_BASE))}",
        )


def changes_base(config: Config) -> bool:
    """Whether the file is relative to a base model that its initialisation changed (PiSSA and its kin)."""
    value = config.raw.get("init_lora_weights")
    return isinstance(value, str) and value.lower().startswith(_CHANGED_BASE)


def refuse_changed_base(config: Config) -> None:
    """Refuse PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA without their initial adapter.

    Raises:
        UnsupportedError: naming the file, the key, its value and what to do.
    """
    if changes_base(config):
        raise UnsupportedError(
            "this initialisation changed the base model, so the file alone is not the update",
            file=config.path,
            key="init_lora_weights",
            value=config.raw["init_lora_weights"],
            remedy="Give the adapter as it was before training (initial=...), or save it with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
