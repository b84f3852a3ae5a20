"""The model card (README.md) of a merge: what went in, what was done, what was left out, how to load it.

Names, notes and paths come from files that others made. Whatever the template prints is escaped unless it was marked
as safe here: control characters go, markdown and HTML become plain text, and code stands in a fence that its content
cannot close.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import yaml

from coremerge.equal import said
from coremerge.language import GENERATES, generates
from coremerge.plan import VLLM_RANKS
from coremerge.text import redacted, redacted_words

if TYPE_CHECKING:
    from jinja2 import Template

    from coremerge.adapter import Adapter, Info
    from coremerge.merging import MergeResult
    from coremerge.plan import Plan
    from coremerge.recipe import Recipe, Weight

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
WEIGHTS_FILE = "merge_weights.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardAdapter:
    """One input.

    Attributes:
        name: its label.
        source: as the person gave it.
        revision: the commit on the hub.
        type: PEFT's type.
        ranks: those that occur.
        sha256: of its weights file.
    """

    name: str
    source: str | None = None
    revision: str | None = None
    type: str = "LORA"
    ranks: Sequence[int] = ()
    sha256: str | None = None


@dataclass(frozen=True)
class CardInput:
    """What a card says.

    Attributes:
        inputs: the adapters that were merged.
        recipe: as YAML.
        made: how, where no recipe says it.
        command: that made it: a line, or its words.
        relation: "adapter", or "merge" for a whole model.
        name: of the result, as a title.
        base_model: name or path of the base model.
        base_revision: of the base model.
        task_type: PEFT's task type.
        modules: how many were merged.
        rank: of the result; None for a whole model.
        scale: the overall factor that was applied.
        energy_lost: share of the merged update's energy that the cut to ``rank`` lost.
        dtype: of the result.
        notes: what was cut, dropped or normalised, in plain words.
        refused_by_vllm: why vLLM does not load it, if it does not.
        version: of coremerge.
        license: of the result, as the hub spells it.
    """

    inputs: Sequence[CardAdapter]
    recipe: str | None = None
    made: str | None = None
    command: str | Sequence[str] | None = None
    relation: Literal["adapter", "merge"] = "adapter"
    name: str = "Merged adapter"
    base_model: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    modules: int | None = None
    rank: int | None = None
    scale: float | None = None
    energy_lost: float | None = None
    dtype: str | None = None
    notes: Sequence[str] = ()
    refused_by_vllm: str | None = None
    version: str | None = None
    license: str | None = None


def describe(
    result: MergeResult,
    *,
    command: str | Sequence[str] | None = None,
    relation: Literal["adapter", "merge"] = "adapter",
    dtype: str | None = None,
    notes: Sequence[str] = (),
    hashes: bool = True,
) -> CardInput:
    """What there is to say of a merge.

    Args:
        result: of :func:`coremerge.merge`.
        command: that made it.
        relation: "merge" where it goes into the base model itself.
        dtype: that it is written in; the plan's if None.
        notes: further ones, such as :attr:`coremerge.formats.writer.Saved.notes`.
        hashes: read the inputs' weights again, for their SHA-256.
    """
    from coremerge import __version__
    from coremerge.recipe import write_recipe
    from coremerge.report.cuts import cut_to_rank, cuts_of, taken_as_it_is

    plan, report, info = result.plan, result.report, result.adapter.info
    recipe = plan.recipe
    cuts = (
        []
        if report.made
        else [*cuts_of(recipe.method, recipe.parameters, recipe.steps, report.input_kept, space=recipe.space)]
    )
    cuts += [f"norms: {said(report.norm_factors)}"] if report.norm_factors else []
    cuts += taken_as_it_is(plan, report)
    cuts += cut_to_rank(report.rank, report.lost, report.warnings)
    own = [f"{name}: {note}" for name, adapter in plan.adapters.items() for note in adapter.info.notes]
    if per_module(plan.recipe):
        own.append(f"one weight per module: the recipe shows each adapter's mean, {WEIGHTS_FILE} has them all")
    sources = [adapter.info.source or name for name, adapter in plan.adapters.items()]
    whole = relation == "merge"
    return CardInput(
        [_card_adapter(name, adapter, hashes) for name, adapter in plan.adapters.items()],
        recipe=None if report.made else write_recipe(_with_means(plan), sources, info.base_model),
        made=report.made,
        command=command,
        relation=relation,
        name="Merged model" if whole else "Merged adapter",
        base_model=info.base_model,
        base_revision=info.base_revision,
        task_type=info.task_type or (GENERATES if generates(result.adapter) else None),
        modules=len(result.adapter),
        rank=None if whole else report.rank,
        scale=report.scale,
        energy_lost=None if report.made else report.lost,
        dtype=dtype or str(plan.dtype).removeprefix("torch."),
        notes=[*dict.fromkeys([*cuts, *plan.warnings, *report.warnings, *own, *notes])],
        refused_by_vllm=_why_not_vllm(info, bool(result.adapter.biases)),
        version=__version__,
    )


def per_module(recipe: Recipe) -> bool:
    """Whether weights differ between modules: a table, which is kept in :data:`WEIGHTS_FILE` beside the card."""
    weights = recipe.weights
    return isinstance(weights, Mapping) and any(isinstance(value, Mapping) for value in weights.values())


def _with_means(plan: Plan) -> Recipe:
    weights = plan.recipe.weights
    if not isinstance(weights, Mapping) or not per_module(plan.recipe):
        return plan.recipe
    means = {name: _mean(value) if isinstance(value, Mapping) else value for name, value in weights.items()}
    return plan.recipe.model_copy(update={"weights": means})


def _mean(table: Mapping[str, Weight]) -> float:
    flat = [v for value in table.values() for v in (value if isinstance(value, tuple) else (value,))]
    return round(sum(flat) / max(1, len(flat)), 4)


def _card_adapter(name: str, adapter: Adapter, hashes: bool) -> CardAdapter:
    from coremerge.hashing import file_sha256

    info = adapter.info
    weights = [file for file in info.files if file.suffix in (".safetensors", ".bin")]
    ranks = sorted({module.rank for module in adapter.modules.values()})
    digest = file_sha256(weights[0]) if hashes and weights else None
    return CardAdapter(name, info.source or None, info.revision, info.type, ranks, digest)


def _why_not_vllm(info: Info, biased: bool) -> str | None:
    if biased:
        return "it has trained biases (lora_bias)"
    if info.layer_replication:
        return "it belongs to a stack of repeated layers (layer_replication)"
    if info.token_indices or set(info.modules_to_save) - {"classifier", "score"} or len(info.modules_to_save) > 1:
        return "it carries whole tensors (modules_to_save, trained token rows)"
    return None


class Safe(str):
    """Text that is markdown already."""

    __slots__ = ()


def warm_up() -> None:
    """Import and compile what :func:`model_card` needs: this can be done beside other work."""
    _template()


def model_card(card: CardInput) -> str:
    """A README.md with the hub's front matter; no secret is in it.

    Example:
        >>> text = model_card(CardInput([CardAdapter("a", ranks=[8])], base_model="org/base", rank=8))
        >>> text.splitlines()[:3]
        ['---', 'base_model: org/base', 'base_model_relation: adapter']
    """
    command = card.command
    if command is not None and not isinstance(command, str):
        command = shlex.join(redacted_words(command))
    text = _template().render(
        card={"inputs": card.inputs, "recipe": card.recipe, "command": command},
        front=Safe(front_matter(card)),
        title=card.name,
        summary=Safe(_summary(card)),
        facts=list(_facts(card)),
        notes=list(card.notes),
        loading=_loading(card),
        serving=_serving(card),
        refusal=_refusal(card),
    )
    return redacted(re.sub(r"\n{3,}", "\n\n", text)).rstrip("\n") + "\n"


def front_matter(card: CardInput) -> str:
    """The card's YAML header, as the hub reads it; a base that is no hub id is left out of it."""
    head: dict[str, Any] = {}
    if card.base_model and _HUB_ID.fullmatch(card.base_model):
        head["base_model"] = card.base_model
        head["base_model_relation"] = card.relation
    if card.license:
        head["license"] = clean(card.license)
    head["library_name"] = "peft" if card.relation == "adapter" else "transformers"
    head["tags"] = ["coremerge", "merge"] if card.relation == "merge" else ["lora", "coremerge", "merge"]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()


def clean(text: object) -> str:
    """``text`` on one line, without control characters, terminal escapes or direction marks.

    Example:
        >>> clean("a\\x1b[31mb\\nc\\u202ed")
        'a[31mb cd'
    """
    return " ".join("".join(" " if c.isspace() else c for c in str(text) if c.isspace() or _shown(c)).split())


def escape(text: object) -> str:
    """``text`` as markdown that shows it and nothing else.

    Example:
        >>> escape("<b>[x](y)</b>|`z`")
        '\\\\<b\\\\>\\\\[x\\\\]\\\\(y\\\\)\\\\</b\\\\>\\\\|\\\\`z\\\\`'
    """
    marked = re.sub(r"([\\`*_\[\](){}<>|#~$&!])", r"\\\1", clean(text))
    marked = re.sub(r"(?i)\b(https?|ftp)://", r"\1\\://", marked)
    marked = re.sub(r"(?i)\bwww\.", r"www\\.", marked).replace("@", "\\@")
    return re.sub(r"^(\d*)([.)](?=\s|$)|[-+=:])", r"\1\\\2", marked)


def code(text: object) -> Safe:
    """``text`` as a code span that also fits a table's cell; a dash for nothing."""
    shown = "" if text is None else clean(text)
    if not shown:
        return Safe("–")
    if "|" in shown:
        return Safe(escape(shown))
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return Safe(f"{ticks}{pad}{shown}{pad}{ticks}")


def fence(text: object, language: str = "") -> Safe:
    """``text`` as a block of code that its content cannot end."""
    lines = ["".join(c for c in line if c == "\t" or _shown(c)) for line in str(text).strip("\n").split("\n")]
    ticks = "`" * max(3, _longest_run("\n".join(lines)) + 1)
    return Safe("\n".join([ticks + language, *lines, ticks]))


def _shown(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "–"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        autoescape=False,  # finalize escapes, for markdown
        finalize=lambda value: value if isinstance(value, Safe) else escape(value),
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "fence": fence, "numbers": _numbers}
    source = resources.files("coremerge.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _summary(card: CardInput) -> str:
    count = len(card.inputs)
    inputs = f"{count} adapter{'s' if count != 1 else ''}"
    base = f" of {code(card.base_model)}" if card.base_model else ""
    if card.relation == "merge":
        return f"The base model{base}, with {inputs} merged into its weights by coremerge."
    return (
        f"A LoRA adapter{base}, merged from {inputs} by coremerge. Every scale is in the factors: `lora_alpha` = `r`."
    )


def _facts(card: CardInput) -> Iterable[tuple[str, Safe | str]]:
    if card.base_model:
        yield "base model", code(card.base_model)
    if card.base_revision:
        yield "base revision", code(card.base_revision)
    if card.made:
        yield "made", card.made
    if card.modules is not None:
        yield "modules", str(card.modules)
    if card.rank is not None:
        yield "rank", str(card.rank)
    if card.scale is not None:
        yield "overall scale", f"{card.scale:.6g}"
    if card.energy_lost is not None:
        yield "energy lost by the cut to this rank", f"{100 * card.energy_lost:.3g} %"
    if card.dtype:
        yield "dtype", code(card.dtype)
    if card.version:
        yield "coremerge", card.version


def _loading(card: CardInput) -> str:
    task = _AUTO_CLASSES.get(card.task_type or "", "AutoModel")
    if card.relation == "merge":
        return f'from transformers import {task}\n\nmodel = {task}.from_pretrained("path/to/this/folder")'
    base = _quoted(card.base_model or "path/to/the/base/model")
    revision = f", revision={_quoted(card.base_revision)}" if card.base_revision else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {task}\n\n"
        f"base = {task}.from_pretrained({base}{revision})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
    )


def _quoted(text: str) -> str:
    """As a Python string."""
    return json.dumps(clean(text), ensure_ascii=False)


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``max_lora_rank`` under which vLLM serves ``rank``, if any does.

    Example:
        >>> max_lora_rank(48), max_lora_rank(513)
        (64, None)
    """
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def _serving(card: CardInput) -> str | None:
    if card.task_type not in (None, "CAUSAL_LM"):
        return None
    if card.relation == "merge":
        return "vllm serve path/to/this/folder" if card.task_type else None
    allowed = max_lora_rank(card.rank or 1)
    if card.refused_by_vllm or allowed is None:
        return None
    named = clean(card.base_model or "")
    base = shlex.quote("path/to/the/base/model" if named.startswith("-") else named or "path/to/the/base/model")
    return f"vllm serve {base} --enable-lora --max-lora-rank {allowed} \\\n  --lora-modules merged=path/to/this/folder"


def _refusal(card: CardInput) -> str | None:
    if card.relation == "merge":
        return None
    if card.refused_by_vllm:
        return f"vLLM does not load it: {card.refused_by_vllm}."
    if card.rank is not None and max_lora_rank(card.rank) is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one is {card.rank}: merge again with a lower --rank."
        )
    return None
