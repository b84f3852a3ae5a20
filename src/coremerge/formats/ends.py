"""A base model's input embedding and output layer: what they are called, and whether they are one (tied weights).

By the model's class where transformers is installed and knows it, else by names that are common.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coremerge.adapter import Adapter
from coremerge.extras import INPUTS, OUTPUTS, TOKEN_ROWS, end_of, in_no_layer
from coremerge.formats.safetensors_file import Entry
from coremerge.formats.skeleton import Skeleton, skeleton

_OUTPUT_OF = {
    **dict.fromkeys(("whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"), "proj_out"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    "gpt_neox_japanese": "embed_out",
    "modernbert-decoder": "decoder",
}
_OUTPUT_BESIDE = {
    "cls.predictions.bias": "cls.predictions.decoder",
    "predictions.bias": "predictions.decoder",
    "lm_head.layer_norm.weight": "lm_head.decoder",
    "vocab_transform.weight": "vocab_projector",
}
_KEEPS_FLAG = frozenset(("t5", "mt5", "umt5", "longt5", "udop", "switch_transformers"))
"""Models whose classes scale the decoder's output where ``tie_word_embeddings`` is true, or set it by themselves."""


@dataclass(frozen=True)
class Ends:
    """The ends of a base model, as its files call them.

    Attributes:
        groups: tensors that the model has as one parameter.
        copies: those of them that are not in the files → one that is.
        input: the table of the input embedding.
        outputs: the weights of output layers.
        alias: what the model or the adapter calls its output layer → what the files do, where that is another name.
        tied: whether the base takes its output layer from its input.
        flagged: whether ``tie_word_embeddings`` must be switched off for them to differ.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    input: str | None = None
    outputs: frozenset[str] = frozenset()
    alias: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    flagged: bool = True

    def tied_to(self, key: str) -> tuple[str, ...]:
        """What ``key`` is one parameter with."""
        return next((tuple(other for other in group if other != key) for group in self.groups if key in group), ())


def find_ends(entries: Mapping[str, Entry], config: Mapping[str, Any], adapter: Adapter) -> Ends:
    """The ends of the base of ``entries`` and ``config``, if ``adapter`` has anything outside the stacks of layers."""
    names = sorted(filter(in_no_layer, _parameters(adapter)))
    if not names:
        return Ends()
    made = skeleton(config, adapter.info, names)
    ends = _by_class(made, entries, config) if made else _by_names(names, entries, config)
    return replace(ends, alias=dict(_renamed(ends, names, entries)))


def _renamed(ends: Ends, names: Iterable[str], entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """An output layer that was renamed since the files were made, as GPT-NeoX's ``embed_out``: there is but one."""
    there = [key for key in entries if end_of(key) in OUTPUTS and key.endswith(".weight")]
    for name in names if len(there) == 1 else ():
        known = name in entries or name in ends.copies
        if name.endswith(".weight") and end_of(name) in OUTPUTS and not known:
            yield name, there[0]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in ``config.json`` where input and output are no longer one."""
    flags = {"tie_word_embeddings": False, **{key: False for key in ("tie_embedding",) if key in config}}
    parts = {
        key: {**part, **untied(part)}
        for key, part in config.items()
        if isinstance(part, dict) and (key == "text_config" or "tie_word_embeddings" in part)
    }
    return {**flags, **parts}


def _parameters(adapter: Adapter) -> Iterable[str]:
    yield from (f"{name}.weight" for name in adapter.modules)
    yield from (
        f"{name.removesuffix(TOKEN_ROWS)}.weight" if name.endswith(TOKEN_ROWS) else name for name in adapter.extras
    )


def _by_class(made: Skeleton, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Ends:
    groups: list[tuple[str, ...]] = []
    copies: dict[str, str] = {}
    for names in made.shared:
        found = {name: stored(name, entries, made.shapes) for name in names}
        there = [key for key in found.values() if key]
        if there:
            groups.append(tuple(found[name] or name for name in names))
            copies |= {name: there[0] for name, key in found.items() if not key}
    ends = [name and (stored(name, entries, made.shapes) or name) for name in (made.input, made.output)]
    flagged = config.get("model_type") not in _KEEPS_FLAG
    return Ends(tuple(groups), copies, ends[0], frozenset(filter(None, ends[1:])), tied=bool(groups), flagged=flagged)


def stored(name: str, entries: Mapping[str, Entry], others: Container[str]) -> str | None:
    """What the files call the parameter ``name``: so, or by the one name that ends alike and is none of ``others``."""
    if name in entries:
        return name
    tail = ".".join(name.split(".")[-2:])
    found = [key for key in entries if f".{key}".endswith(f".{tail}") and key not in others]
    if name == tail:
        found = [key for key in found if _is_beside_input(key, tail, entries)]
    return found[0] if len(found) == 1 else None


def _is_beside_input(key: str, output: str, entries: Iterable[str]) -> bool:
    """Whether ``key`` is the ``output`` of the tower that has an input: in old files, ``language_model.lm_head``."""
    tower = key.removesuffix(output)
    return end_of(output) in OUTPUTS and any(other.startswith(tower) and _ends(other, INPUTS) for other in entries)


def _by_names(names: Iterable[str], entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Ends:
    if str(config.get("model_type")).endswith("encoder-decoder") and isinstance(config.get("decoder"), dict):
        return _of_decoder(names, entries, config["decoder"])
    tables = [key for key in entries if _ends(key, INPUTS)]
    outputs = [key for key in entries if _ends(key, OUTPUTS)]
    known = {end_of(key) for key in outputs}
    outputs += [name for name in names if _ends(name, OUTPUTS) and name not in entries and end_of(name) not in known]
    tied = _says_tied(config, entries)
    if not tied or not tables:
        return Ends((), {}, next(iter(tables), None), frozenset(outputs), tied=tied)
    outputs = outputs or [_usual_output(entries, config, entries[tables[0]].shape[:1])]
    alike = [key for key in tables if entries[key].shape == entries[tables[0]].shape]
    groups = [(*dict.fromkeys((*alike, *_towers(alike))), *outputs), *_biases(outputs, entries)]
    copies = {key: group[0] for group in groups for key in group if key not in entries}
    flagged = config.get("model_type") not in _KEEPS_FLAG
    return Ends(tuple(groups), copies, tables[0], frozenset(outputs), tied=tied, flagged=flagged)


def _of_decoder(names: Iterable[str], entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Ends:
    """Of a pair that was put together from two models: its decoder's, for the encoder has no output."""
    mark = "decoder."
    inner = {key.removeprefix(mark): entry for key, entry in entries.items() if key.startswith(mark)}
    ends = _by_names([name.removeprefix(mark) for name in names if name.startswith(mark)], inner, config)
    return replace(
        ends,
        groups=tuple(tuple(mark + key for key in group) for group in ends.groups),
        copies={mark + key: mark + source for key, source in ends.copies.items()},
        input=ends.input and mark + ends.input,
        outputs=frozenset(mark + key for key in ends.outputs),
    )


def _usual_output(entries: Mapping[str, Entry], config: Mapping[str, Any], vocabulary: tuple[int, ...]) -> str:
    """By what is beside it, its own bias (files keep that of a tied layer), the model type; else ``lm_head``."""
    beside = next((name for key, name in _OUTPUT_BESIDE.items() if key in entries), None)
    layers = (key.removesuffix(".bias") for key, entry in entries.items() if entry.shape == vocabulary)
    biased = next((name for name in layers if f"{name}.bias" in entries and f"{name}.weight" not in entries), None)
    return (beside or biased or _OUTPUT_OF.get(str(config.get("model_type")), "lm_head")) + ".weight"


def _towers(tables: Iterable[str]) -> Iterator[str]:
    """The tables of encoder and decoder, which are one with ``shared``."""
    for key in tables:
        if _ends(key, ("shared",)):
            stem = key.removesuffix("shared.weight")
            yield from (f"{stem}{tower}.embed_tokens.weight" for tower in ("encoder", "decoder"))


def _biases(outputs: Iterable[str], entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Of masked language models: the head and its decoder have one bias."""
    for key in outputs:
        bias = key.removesuffix("decoder.weight") + "bias"
        if bias in entries:
            yield bias, key.removesuffix("weight") + "bias"


def _says_tied(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """By the config; where it says nothing, a base without an output layer has tied it."""
    inner = config.get("text_config")
    said = {**config, **(inner if isinstance(inner, dict) else {})}.get("tie_word_embeddings")
    return bool(said) if said is not None else not any(_ends(key, OUTPUTS) for key in entries)


def _ends(key: str, names: tuple[str, ...]) -> bool:
    return in_no_layer(key) and f".{key}".endswith(tuple(f".{name}.weight" for name in names))
