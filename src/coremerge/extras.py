"""Whole tensors that adapters carry besides their updates: saved modules and trained token rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, MismatchError

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "tokens_embed",
          "embeddings", "word_embedding")  # fmt: skip
"""What models call the table of their input embedding."""
OUTPUTS = ("lm_head", "embed_out", "output", "proj_out", "output_projection", "vocab_projector", "lm_loss",
           "generator_lm_head", "cls.predictions.decoder", "lm_head.decoder", "lm_head.out_proj")  # fmt: skip
"""What models call the layer of their output."""


@dataclass(frozen=True)
class Extra:
    """What becomes of one extra tensor.

    Attributes:
        name: the parameter's name in the base model.
        holders: the adapters that carry it.
        decision: in plain words.
        load: gives the merged tensor; None where it is dropped.
        tokens: the token ids of its rows, for trained token rows.
    """

    name: str
    holders: tuple[str, ...]
    decision: str
    load: Callable[[], Tensor] | None
    tokens: tuple[int, ...] = ()


def in_no_layer(name: str) -> bool:
    """Whether a parameter is in none of the numbered layers of a model."""
    return not any(part.isdigit() for part in name.split("."))


def end_of(parameter: str) -> str | None:
    """The layer that ``parameter`` belongs to, if it is one of :data:`INPUTS` and :data:`OUTPUTS`."""
    layer = f".{parameter}".rpartition(".")[0]
    return next((end for end in INPUTS + OUTPUTS if layer.endswith(f".{end}") and in_no_layer(layer)), None)


def plan_extras(adapters: Mapping[str, Adapter], policy: str | None) -> dict[str, Extra]:
    """Decide on every extra tensor: carried where one adapter has it or all copies are equal, else by ``policy``.

    Args:
        policy: None, ``"average"``, ``"drop"``, or the name of the adapter to take clashing tensors from.

    Raises:
        ConfigError: ``policy`` names no adapter.
        MismatchError: copies differ and no policy was given, or it cannot be applied.
    """
    if policy not in (None, "average", "drop", *adapters):
        raise ConfigError(
            "neither 'average' nor 'drop' nor an adapter",
            key="extras",
            value=policy,
            remedy=f"Adapters: {', '.join(adapters)}",
        )
    names = sorted({name for adapter in adapters.values() for name in adapter.extras})
    return {name: _decide(name, adapters, policy) for name in names}


def _decide(name: str, adapters: Mapping[str, Adapter], policy: str | None) -> Extra:
    holders = tuple(key for key, adapter in adapters.items() if name in adapter.extras)
    tensors = [lambda key=key: adapters[key].extras[name] for key in holders]
    tokens = [token_ids(adapters[key], name) for key in holders]
    if len(holders) == 1:
        return Extra(name, holders, f"carried over from {holders[0]}", tensors[0], tokens[0])
    if all(tokens):
        return _join(name, holders, tensors, tokens, policy)
    if _all_equal(tensors):
        return Extra(name, holders, "carried over: equal in all that have it", tensors[0])
    longest = _continued(tensors) if end_of(name) and policy not in holders else None
    if longest is not None:
        decision = f"carried over from {holders[longest]}: the others are its first rows"
        return Extra(name, holders, decision, tensors[longest])
    if policy == "drop":
        return Extra(name, holders, "dropped, as asked", None)
    if policy not in holders and end_of(name):
        _same_vocabulary(name, holders, tensors)
    if policy == "average":
        _same_shape(name, holders, tensors)
        return Extra(name, holders, "averaged, as asked", lambda: _average(tensors))
    if policy in holders:
        return Extra(name, holders, f"taken from {policy}, as asked", tensors[holders.index(policy)])
    raise _clash(name, holders, policy)


def _same_vocabulary(name: str, holders: tuple[str, ...], tensors: Sequence[Callable[[], Tensor]]) -> None:
    sizes = {key: _length(load()) for key, load in zip(holders, tensors, strict=True)}
    if len(set(sizes.values())) > 1:
        raise MismatchError(
            f"tables of different vocabularies: {', '.join(f'{size} tokens in {key}' for key, size in sizes.items())}",
            key=name,
            remedy=f"Train them with one tokenizer, or take one table (--extras {max(sizes, key=lambda k: sizes[k])}):"
            " tokens that only the others added are then lost",
        )


def token_ids(adapter: Adapter, name: str) -> tuple[int, ...]:
    """The token ids of the rows in extra ``name``; empty for a tensor that is not token rows."""
    if not name.endswith(TOKEN_ROWS):
        return ()
    module = name.removesuffix(TOKEN_ROWS)
    for key, ids in adapter.info.token_indices.items():
        if module == key or module.endswith(f".{key}"):
            return tuple(ids)
    return ()


def _join(
    name: str,
    holders: tuple[str, ...],
    tensors: Sequence[Callable[[], Tensor]],
    tokens: Sequence[tuple[int, ...]],
    policy: str | None,
) -> Extra:
    """The union of token rows; rows that several adapters trained differently go by ``policy``."""
    rows: dict[int, list[Tensor]] = {}
    for load, ids in zip(tensors, tokens, strict=True):
        for token, row in zip(ids, load(), strict=True):
            rows.setdefault(token, []).append(row)
    clash = any(not torch.equal(row, group[0]) for group in rows.values() for row in group[1:])
    decision = "token rows joined"
    if clash:
        if policy == "drop":
            return Extra(name, holders, "dropped, as asked", None)
        if policy in holders:
            own = holders.index(policy)
            chosen = dict(zip(tokens[own], tensors[own](), strict=True))
            rows = {token: [chosen.get(token, group[0])] for token, group in rows.items()}
            decision = f"token rows joined, clashing ones from {policy}, as asked"
        elif policy == "average":
            rows = {token: [torch.stack(group).double().mean(0).to(group[0].dtype)] for token, group in rows.items()}
            decision = "token rows joined, clashing ones averaged, as asked"
        else:
            raise _clash(name, holders, policy)
    ids = tuple(sorted(rows))
    return Extra(name, holders, decision, lambda: torch.stack([rows[token][0] for token in ids]), ids)


def _all_equal(tensors: Sequence[Callable[[], Tensor]]) -> bool:
    first = tensors[0]()
    return all(torch.equal(first, load()) for load in tensors[1:])


def _continued(tensors: Sequence[Callable[[], Tensor]]) -> int | None:
    """Which one goes on where the others end: a vocabulary that only grew or was padded, and trained no old row."""
    lengths = [_length(load()) for load in tensors]
    longest = lengths.index(max(lengths))
    whole = tensors[longest]()
    if not whole.ndim:
        return None
    alike = (torch.equal(whole[:length], load()) for length, load in zip(lengths, tensors, strict=True))
    return longest if all(alike) else None


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _average(tensors: Sequence[Callable[[], Tensor]]) -> Tensor:
    first = tensors[0]()
    result = first.double()
    for load in tensors[1:]:
        result = result + load().double()
    return (result / len(tensors)).to(first.dtype)


def _same_shape(name: str, holders: tuple[str, ...], tensors: Sequence[Callable[[], Tensor]]) -> None:
    shapes = {key: tuple(load().shape) for key, load in zip(holders, tensors, strict=True)}
    if len(set(shapes.values())) > 1:
        raise MismatchError(
            f"copies of different shapes cannot be averaged: {shapes}",
            key=name,
            remedy=f"Take one (--extras {holders[0]}) or drop it (--extras drop)",
        )


def _clash(name: str, holders: tuple[str, ...], policy: str | None) -> MismatchError:
    asked = f"; {policy!r} does not have it" if policy else ""
    table = end_of(name)  # without it the tokens that were added have no rows
    others = "--extras average; both need one tokenizer" if table else "--extras average, or --extras drop"
    return MismatchError(
        f"trained whole by {', '.join(holders)}, with different values{asked}",
        key=name,
        remedy=f"Say which to take (--extras {holders[0]}){' or' if table else ','} {others}",
    )
