"""One name for one weight, over adapters that know the base model under different names.

Transformers has moved the towers of its models, and trainers load them as parts of others: one weight may be
``model.layers.0…`` in one adapter and ``model.language_model.layers.0…`` in the next. Side by side they would be two
modules, of which a base has only one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from coremerge.adapter import Adapter, Lazy
from coremerge.errors import ConfigError, MismatchError
from coremerge.extras import OUTPUTS
from coremerge.fused import joined

_TOWERS = (
    "language_model|visual|vision_tower|vision_model|vision_encoder|vit|audio_tower|audio_model|multi_modal_projector"
    "|mm_projector|connector|embed_vision|embed_audio|text_model|encoder|decoder|shared"
)
_TODAY = (
    (r"(?:model\.)?language_model\.lm_head(?=\.|$)", "lm_head"),
    (r"(?:model\.)?(?:language_model|llm)\.(?:model\.)?", "model.language_model."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"(visual|audio_tower|multi_modal_projector)\.", r"model.\1."),
    (rf"model\.(?!(?:{_TOWERS})\.)", "model.language_model."),
)
"""What the parts of a model with several towers were called, and what transformers 5 calls them."""

_HEADS = frozenset((*OUTPUTS, "classifier", "score", "qa_outputs"))
"""What stands beside the part of a model that all of its kind share, not in it."""


def agreed(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """``adapters`` under one name for each weight, as far as that is certain; the others as they are.

    A tower under two of its names goes under today's, and parts of a fused layer become rows of it. What was changed is
    in the notes.
    """
    return joined(_towers(adapters))


def renamed(adapters: Mapping[str, Adapter], rename: Mapping[str, str]) -> dict[str, Adapter]:
    """``adapters`` with the names that begin with one of the keys of ``rename`` beginning with its value.

    Names are those of the base model, cut at their dots; a name that has the new name there already stays. A key that
    no name begins with stands for such steps inside of names. Of several keys the longest counts.

    Raises:
        ConfigError: a key that no name has, or that gives two modules one name.
    """
    if not rename:
        return dict(adapters)
    moves = {old.strip("."): new.strip(".") for old, new in sorted(rename.items(), key=lambda item: -len(item[0]))}
    names = [name for adapter in adapters.values() for name in (*adapter, *adapter.extras)]
    for old in moves:
        if not any(pattern.search(name) for pattern in _patterns(old) for name in names):
            raise ConfigError(
                "no module's name begins with it, or has it inside", key="rename", value=old,
                remedy=f"Names: {', '.join(sorted({*names})[:3])}, ...",
            )  # fmt: skip
    move = _mover(moves, names)
    try:
        return {key: under(adapter, move, "as asked") for key, adapter in adapters.items()}
    except MismatchError as error:
        raise ConfigError(
            f"{error.key}: {error.what}", key="rename", value=dict(rename), remedy="Rename one of the two only"
        ) from None


def _mover(moves: Mapping[str, str], names: Iterable[str]) -> Callable[[str], str]:
    chosen = {old: next(p for p in _patterns(old) if any(map(p.search, names))) for old in moves}

    def move(name: str) -> str:
        old = next((old for old, pattern in chosen.items() if pattern.search(name)), None)
        if old is None:
            return name
        found, new = chosen[old].search(name), moves[old]
        assert found is not None
        whole = re.finditer(rf"(?<![^.]){re.escape(new)}(?=\.|$)", name)
        has_it = any(there.start() <= found.start() and found.end() <= there.end() for there in whole)
        return name if has_it else name[: found.start()] + new + name[found.end() :]

    return move


def _patterns(old: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """``old`` in front of a name, and inside of one."""
    return re.compile(rf"^{re.escape(old)}(?=\.|$)"), re.compile(rf"(?<=\.){re.escape(old)}(?=\.|$)")


def under(adapter: Adapter, move: Callable[[str], str], why: str) -> Adapter:
    """``adapter`` with its names changed by ``move``; itself where none changes.

    Raises:
        MismatchError: two modules would have one name.
    """
    modules = {move(name): name for name in adapter.modules}
    extras = {move(name): name for name in adapter.extras}
    for kept in (list(adapter.modules), list(adapter.extras)):
        twice = next((name for name, count in Counter(map(move, kept)).items() if count > 1), None)
        if twice is not None:
            raise MismatchError("two modules of one adapter would have this name", file=adapter.name, key=twice)
    changed = [(old, new) for new, old in (*modules.items(), *extras.items()) if new != old]
    if not changed:
        return adapter
    info = adapter.info
    said = (
        f"{n} names that begin with {a} now begin with {b}" for (a, b), n in Counter(map(_beginning, changed)).items()
    )
    return Adapter(
        {name: adapter.modules[old] for name, old in modules.items()},
        lambda name: adapter[modules[name]],
        read=lambda name, dtype: adapter.read(modules[name], dtype),
        name=adapter.name,
        biases=Lazy(tuple(map(move, adapter.biases)), lambda name: adapter.biases[modules[name]]),
        extras=Lazy(tuple(extras), lambda name: adapter.extras[extras[name]]),
        info=replace(
            info,
            modules_to_save=tuple(dict.fromkeys(map(move, info.modules_to_save))),
            token_indices={move(name): ids for name, ids in info.token_indices.items()},
            targets=(),
            moved=True,
            notes=(*info.notes, f"{'; '.join(said)}: {why}"),
        ),
    )


def _beginning(names: tuple[str, str]) -> tuple[str, str]:
    """An old and a new name without the end that they share, but for one step of it."""
    old, new = (name.split(".") for name in names)
    while len(old) > 1 and len(new) > 1 and old[-2:] == new[-2:]:
        old, new = old[:-1], new[:-1]
    return ".".join(old), ".".join(new)


def _today(name: str) -> str:
    for pattern, new in _TODAY:
        found, count = re.subn(f"^{pattern}", new, name)
        if count:
            return found
    return name


def _towers(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Where one module has several spellings of :data:`_TODAY`'s, all adapters in the newest."""
    spelt: dict[str, dict[str, object]] = {}
    for adapter in adapters.values():
        for name, module in adapter.modules.items():
            spelt.setdefault(_today(name), {})[name] = (module.shape, module.kind, module.kernel)
    several = [known for known in spelt.values() if len(known) > 1]
    alike = all(len(set(known.values())) == 1 for known in several)
    if not several or not alike:
        return dict(adapters)
    try:
        why = "as transformers calls that part of the base today; the adapters had two names for it"
        return {key: under(adapter, _today, why) for key, adapter in adapters.items()}
    except MismatchError:  # one adapter has both: they are two modules
        return dict(adapters)


def unsettled(adapters: Mapping[str, Adapter]) -> str | None:
    """The options that make one tower of what two adapters have under different names, if that is likely.

    Example:
        >>> import torch
        >>> from coremerge.lowrank import LowRank
        >>> update = LowRank(torch.ones(3, 1), torch.ones(1, 2))
        >>> made = [Adapter.from_updates({f"{tower}layers.0.q_proj": update}) for tower in ("", "bert.")]
        >>> unsettled(dict(zip("ab", made)))
        '--rename layers=bert.layers'
    """
    first, *others = adapters.values()
    for other in others:
        if pair := _beginnings(first, other):
            return " ".join(f"--rename {old}={new}" for old, new in _as_options(*pair, first, other))
    return None


def suspected(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """What to say of adapters with common modules whose others have the same names but for something in front."""
    (name, first), *others = adapters.items()
    for key, other in others:
        pair = _beginnings(first, other, (_whole,))
        if pair and not first.modules.keys().isdisjoint(other.modules):
            short, long = sorted(pair, key=len)
            if not short or long.endswith(f".{short}"):
                options = " ".join(f"--rename {old}={new}" for old, new in _as_options(*pair, first, other))
                yield f"{name} and {key} have modules of one name but for its beginning: if they are one, {options}"


def _whole(name: str) -> str:
    return name


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _beginnings(
    first: Adapter, other: Adapter, parts: Iterable[Callable[[str], str]] = (_whole, _parent)
) -> tuple[str, str] | None:
    """What stands before the longest ends that names of the two have in common, as most of them have it."""
    for named in parts:
        shapes = {named(name): first.modules[name].shape for name in first if name not in other}
        ends: dict[str, list[str]] = {}
        for mine in shapes:
            for end in _ends(mine):
                ends.setdefault(end, []).append(mine)
        count: Counter[tuple[str, str]] = Counter()
        for full in (name for name in other if name not in first):
            theirs = named(full)
            end = next((end for end in _ends(theirs) if len(ends.get(end, ())) == 1), "")
            if end and (theirs != full or shapes[ends[end][0]] == other.modules[full].shape):
                count[_before(ends[end][0], end), _before(theirs, end)] += 1
        if count:
            return count.most_common(1)[0][0]
    return None


def _ends(name: str) -> Iterable[str]:
    """The ends of ``name`` after each of its dots, the longest first; one step alone is none."""
    steps = name.split(".")
    return (".".join(steps[at:]) for at in range(len(steps) - 1))


def _before(name: str, end: str) -> str:
    return name.removesuffix(end).rstrip(".")


def _as_options(mine: str, theirs: str, first: Adapter, other: Adapter) -> list[tuple[str, str]]:
    """From the shorter of two beginnings to the longer; where one is empty, from what follows it."""
    both = sorted(((mine, first), (theirs, other)), key=lambda item: item[0].count(".") + bool(item[0]))
    (old, adapter), (new, _) = both
    if old:
        return [(old, new)]
    tops = {name.partition(".")[0] for name in adapter if name not in first or name not in other}
    whole = {name.partition(".")[0] for name in adapter.extras if name not in first.extras or name not in other.extras}
    return [(top, f"{new}.{top}") for top in sorted(tops | (whole - _HEADS))]
