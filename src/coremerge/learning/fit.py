"""The merged cores from unlabelled inputs, in closed form: no gradient, and a few forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from coremerge.adapter import Adapter
from coremerge.errors import ConfigError, MismatchError, UnsupportedError
from coremerge.executors import Executor, Group, shares
from coremerge.executors.local import Here
from coremerge.learning.backbone import Batch, seeded
from coremerge.learning.beyond import BEYOND
from coremerge.learning.cores import Cores
from coremerge.learning.fitting import Drawn, Fitting, ModuleFit, Progress, mean_lost
from coremerge.learning.given import check_adapters, check_data, first_row, listed, rows_of
from coremerge.learning.kept import Kept, mark_of
from coremerge.learning.leastsquares import ASIDE, allot
from coremerge.learning.passes import Layout, Opening, lots_of
from coremerge.learning.weights import check_names
from coremerge.merging import MergeResult, execute, lifted
from coremerge.outcome import Report, report_of
from coremerge.plan import Plan, make_plan
from coremerge.recipe import Recipe

PRIORS: Mapping[str, Recipe | None] = {
    "iso": Recipe(method="sum", steps=["isotropize"]),
    "merge": Recipe(),
    "router": None,
    "regmean": None,
    "regmean++": None,
    "zero": None,
}
"""By name: merges without data; SSR-Merge's router, RegMean and RegMean++, from the inputs; nothing at all."""

PRIOR = "iso"
RIDGE = 0.1

RIDGE_ANSWERED, BEYOND_ANSWERED = 0.001, 512
"""With answers of decoders, in place of :data:`RIDGE` and :data:`~coremerge.learning.beyond.BEYOND`: docs/log.md has
others. Of an encoder with a decoder, Whisper, two tasks keep 1.0 at the usual ridge, .98 at .01."""
LEAST_ASIDE = 1e-6


@dataclass(frozen=True)
class FitReport(Report):
    """What a fit did: as :class:`~coremerge.outcome.Report`, and how.

    Attributes:
        fits: module name → :class:`~coremerge.learning.fitting.ModuleFit`; modules that no input reached are absent.
        prior: what the cores are drawn to.
        ridge: how strongly; None in JSON where it was infinite.
        states: where hidden states were kept: ``memory`` or ``disk``.
    """

    fits: Mapping[str, ModuleFit] = field(default_factory=dict)
    prior: str = ""
    ridge: float = 0.0
    states: str = "memory"

    @property
    def outputs_lost(self) -> float:
        """What cuts to ranks lost of the merged outputs on the inputs, on average over the modules of ``fits``."""
        return mean_lost(self.fits)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        modules = {name: vars(fit) for name, fit in self.fits.items()}
        ridge = self.ridge if math.isfinite(self.ridge) else None
        said = {"prior": self.prior, "ridge": ridge, "outputs_lost": self.outputs_lost, "modules": modules}
        return super().to_dict() | {"fit": said}


def fit(
    model: nn.Module | Callable[[], nn.Module],
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    data: Mapping[str, Iterable[Batch]],
    *,
    rank: int | None = None,
    rank_budget: int | None = None,
    prior: str | Recipe | Adapter | None = None,
    ridge: float | None = None,
    aside: float = ASIDE,
    beyond: int | None = None,
    answered: bool = False,
    preferences: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    extras: str | None = None,
    allow_disjoint: bool = False,
    spill: str | Path | bool | None = None,
    resume: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge ``adapters`` so that the model passes on, for each task's inputs, what it would with that task's adapter.

    Module by module in the order of the forward pass, by least squares in core space: see
    :mod:`coremerge.learning.leastsquares`. The model is run and is as it was afterwards.

    Args:
        model: as :func:`~coremerge.learning.learn_weights` takes it, or what makes it.
        adapters: name → adapter, of any rank, alpha and type; all modules linear (or GPT-2's Conv1D).
        data: the same names → batches, as the model takes them; labels are not read. An adapter without data counts
            through the prior alone.
        rank: of the result; each module is cut in the metric of its own inputs before the next one is fitted. None: as
            high as the fit comes out.
        rank_budget: the modules' mean rank, higher where it brings more to the outputs; ``rank`` is then the most that
            one of them has. The file has the largest of them for all, with zero rows. Costs a second fit.
        prior: what the cores are drawn to: a name of :data:`PRIORS` (by default ``"iso"``: the sum, isotropized, at
            automatic scale), a recipe, whose merge it is, or an adapter (as far as what is fitted spans it).
        ridge: how strongly, as a share of the inputs' mean second moment along what the adapters read; by default 0.1,
            and 0.001 with answers of decoders; infinite: the prior alone.
        aside: how much an error counts in a direction in which the task's own adapter does not move the output; 1:
            plain least squares.
        beyond: directions of its inputs that a module of the result may read besides those that the adapters read, by
            default 128, and 512 with answers of decoders; 0: none. See :mod:`coremerge.learning.beyond`.
        answered: prompts have answers behind them: see :mod:`coremerge.learning.own_answers`.
        preferences: task → how much its errors count; 1 for those not named, 0: not at all.
        seed: of anything random in the model, and in the prior.
        dtype: of the result: see :class:`~coremerge.Recipe`, as are ``extras`` and ``allow_disjoint``.
        extras: what to do with whole tensors that adapters carry.
        allow_disjoint: merge adapters none of whose modules coincide.
        spill: keep hidden states on disk: in this folder, or (True) where temporary files go; False: in memory. By
            default on disk where they may take more than a gibibyte.
        resume: a file in which modules that are done are kept, and from which they are taken if it is there already.
        executor: other processes that share the inputs, each with a model of its own, such as
            :class:`coremerge.executors.ray.Ray`.
        progress: called as modules are done, with their number and that of all; False stops, as ``KeyboardInterrupt``.

    Returns:
        the merged adapter, and a :class:`FitReport`.

    Raises:
        ConfigError: a setting that means nothing, a task that is no adapter, no inputs; a ``resume`` of something else.
        InputError: a task without inputs; what is no adapter, or no batch; the model stops on one with an exception of
            its own, which is the cause.
        MismatchError: the model (or an adapter that is the prior) lacks a module, or has it in another shape.
        UnsupportedError: a module that cannot be hooked, biases in the adapters, or inputs that take other ways through
            the merged model than through their own (experts).

    Source: ours; its neighbours are RegMean (2212.09849), SSR-Merge (2606.10617) and CtM (2606.03723).
    """
    output = {"rank": rank, "dtype": dtype, "extras": extras, "allow_disjoint": allow_disjoint, "seed": seed}
    check_adapters(adapters)
    plan = make_plan(adapters, _recipe(PRIOR if prior is None else prior, output))
    given: dict[str, Any] = {"rank_budget": rank_budget, "ridge": ridge, "aside": aside, "beyond": beyond}
    given |= {"answered": answered, "preferences": preferences}
    return fit_plan(
        model, plan, data, prior=prior, spill=spill, resume=resume, executor=executor, progress=progress, **given
    )


def _recipe(prior: str | Recipe | Adapter, output: Mapping[str, Any]) -> Recipe:
    """:func:`prior_recipe`, with what is asked of the result in place of what it says."""
    for key in ("rank", "seed"):
        if isinstance(output[key], bool):  # to pydantic, True is 1
            raise ConfigError("a whole number is needed", key=key, value=output[key])
    return prior_recipe(prior).but(**output)


def prior_recipe(prior: str | Recipe | Adapter) -> Recipe:
    """The recipe that a fit's plan has: the prior's, where it is a merge.

    Raises:
        ConfigError: an unknown prior.
    """
    if isinstance(prior, Recipe):
        return prior
    if isinstance(prior, Adapter):
        return Recipe(method="sum")
    if not isinstance(prior, str) or prior not in PRIORS:
        known = ", ".join(PRIORS)
        remedy = f"Known: {known}; a recipe, or an adapter"
        raise ConfigError("no such prior", key="prior", value=prior, remedy=remedy)
    return PRIORS[prior] or Recipe(method="sum")


def fit_plan(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    data: Mapping[str, Iterable[Batch]],
    *,
    rank_budget: int | None = None,
    prior: str | Recipe | Adapter | None = None,
    ridge: float | None = None,
    aside: float = ASIDE,
    beyond: int | None = None,
    answered: bool = False,
    preferences: Mapping[str, float] | None = None,
    spill: str | Path | bool | None = None,
    resume: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """:func:`fit` with a plan: its recipe is :func:`prior_recipe`, its rank that of the result."""
    start = time.perf_counter()
    prior = PRIOR if prior is None else prior
    likes = dict(preferences or {})
    check_settings(plan, ridge, rank_budget, aside=aside, beyond=beyond, preferences=likes)
    rank = _rank(plan)
    batches = _batches(plan, data, likes)
    behind = answered and _in_one_text(batches)
    ridge = (RIDGE_ANSWERED if behind else RIDGE) if ridge is None else ridge
    beyond = (BEYOND_ANSWERED if behind else BEYOND) if beyond is None else beyond
    drawn = Drawn(_prior(prior, plan), ridge, aside, rank, likes)
    if not drawn.alone and not drawn.as_it_is(plan):
        drawn = replace(drawn, beyond=int(beyond))
    name = _called(drawn.prior if len(plan.adapters) == 1 else prior)
    recipe = plan.recipe.model_dump(mode="json")
    settings = {"recipe": recipe, "prior": name, "ridge": ridge, "aside": aside, "preferences": likes}
    settings["beyond"] = drawn.beyond
    others = {"(prior)": prior} if isinstance(prior, Adapter) else {}
    cores = Cores(plan)
    with ExitStack() as undo:
        undo.enter_context(seeded(plan.recipe.seed))
        place = spill if spill is None or isinstance(spill, bool) else str(Path(spill).expanduser().absolute())
        opening = Opening(model, plan, _samples(batches), place, drawn.own_inputs_do, drawn.beyond)
        group = _group(opening, batches, cores, executor)
        undo.callback(group.close)
        layout: Layout = next(group.ask("layout"))
        mark = mark_of(layout.mark, {**plan.adapters, **others}, batches, settings)

        def run_with(drawn: Drawn, mark: str, suffix: str = "") -> Fitting:
            kept = Kept(None if resume is None else Path(f"{resume}{suffix}"), mark)
            undo.callback(kept.close)
            run = Fitting(group, layout, list(batches), drawn, kept=kept, cores=cores)
            run.go(progress)
            return run

        if rank_budget is not None:
            ranks = _allotted(run_with(replace(drawn, rank=None), mark, ".exact"), rank_budget, rank)
            drawn = replace(drawn, rank=ranks)
            mark += f" {rank_budget}"
        run = run_with(drawn, mark)
    reports = {name: run.solved[name].report for name in plan.modules}
    plain = report_of(plan, reports, 1.0, time.perf_counter() - start)
    inputs = _counted(batches) + (", with the adapters' own answers" if answered else "")
    report = _told(plain, run, f"fitted to {inputs}; prior: {name}, ridge {ridge:g}", name, ridge)
    return MergeResult(lifted(plan, cores.parts, run.solved, reports), report, plan)


def _batches(plan: Plan, data: Mapping[str, Iterable[Batch]], likes: Mapping[str, float]) -> dict[str, list[Batch]]:
    """The inputs of each task, in the adapters' order, without labels."""
    check_data(data)
    check_names("data", data, plan.adapters)
    found = {name: [_unlabelled(b) for b in listed(data[name], name)] for name in plan.adapters if name in data}
    if not any(likes.get(task, 1.0) for task in found):
        remedy = "Give inputs of at least one adapter's task, and a preference"
        raise ConfigError("no task to fit to", key="data", remedy=remedy)
    return found


def _in_one_text(batches: Mapping[str, Sequence[Batch]]) -> bool:
    """Whether answers are behind their prompts: what reads those sees the answers' tokens, too, as no encoder does."""
    return not any("decoder_input_ids" in batch for listed in batches.values() for batch in listed)


def _samples(batches: Mapping[str, Sequence[Batch]]) -> list[tuple[str, Batch]]:
    """An input of each kind, and its task: some may be texts, some images, some both, which come first."""
    kinds: dict[frozenset[str], tuple[str, Batch]] = {}
    for task, given in batches.items():
        for batch in given:
            kinds.setdefault(frozenset(batch), (task, first_row(batch)))
    return [kinds[keys] for keys in sorted(kinds, key=len, reverse=True)]


def _told(plain: Report, run: Fitting, made: str, prior: str, ridge: float) -> FitReport:
    said = vars(plain) | {"warnings": (*plain.warnings, *run.warnings()), "made": made}
    return FitReport(**said, fits=run.fits, prior=prior, ridge=ridge, states=run.layout.states)


def _counted(batches: Mapping[str, Sequence[Batch]]) -> str:
    inputs = sum(rows_of(batch) for listed in batches.values() for batch in listed)
    return f"{inputs} inputs of {len(batches)} task{'s' if len(batches) != 1 else ''}"


def _group(opening: Opening, batches: Mapping[str, Sequence[Batch]], cores: Cores, executor: Executor | None) -> Group:
    """The inputs' side of the fit: here, or shared out among models that an executor has room for."""
    lots = lots_of(batches)
    return executor.hold(opening, shares(lots, executor.replicas)) if executor else Here(opening(lots, cores))


def _allotted(exact: Fitting, budget: int, most: int | None) -> dict[str, int]:
    """The ranks of a second fit; a module that no input reaches has the budget."""
    return dict.fromkeys(exact.plan.modules, budget) | allot(exact.gains, budget, most)


def _called(prior: str | Recipe | Adapter) -> str:
    if isinstance(prior, Adapter):
        return prior.name
    return f"merge by {prior.method}" if isinstance(prior, Recipe) else prior


def _unlabelled(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"} if "labels" in batch else batch


def check_settings(
    plan: Plan,
    ridge: float | None = None,
    rank_budget: int | None = None,
    *,
    aside: float = ASIDE,
    beyond: int | None = None,
    preferences: Mapping[str, float] | None = None,
) -> None:
    """What can be refused before a model is there: see :func:`fit`.

    Raises:
        ConfigError: a setting that means nothing.
        UnsupportedError: biases in the adapters.
    """
    _check(plan, RIDGE if ridge is None else ridge, aside, preferences or {})
    _check_beyond(BEYOND if beyond is None else beyond)
    _check_budget(rank_budget, _rank(plan), RIDGE if ridge is None else ridge)


def _rank(plan: Plan) -> int | None:
    return plan.recipe.rank if isinstance(plan.recipe.rank, int) else None


def _check(plan: Plan, ridge: float, aside: float, likes: Mapping[str, float]) -> None:
    if not (_is(Real, ridge) and ridge >= 0):
        raise ConfigError("a number of at least zero is needed", key="ridge", value=ridge)
    check_names("preferences", likes, plan.adapters)
    wrong = next((task for task, x in likes.items() if not (_is(Real, x) and 0 <= x < math.inf)), None)
    if wrong is not None:
        raise ConfigError("a finite number of at least zero is needed", key=f"preferences.{wrong}", value=likes[wrong])
    if not (_is(Real, aside) and LEAST_ASIDE <= aside <= 1):
        raise ConfigError(f"at least {LEAST_ASIDE:g}, at most 1", key="aside", value=aside)
    biased = next((name for name, adapter in plan.adapters.items() if adapter.biases), None)
    if biased:
        raise UnsupportedError(
            "its updates have biases (lora_bias), which a core does not hold", key=biased,
            remedy="Learn weights instead: coremerge learn-weights",
        )  # fmt: skip


def _check_beyond(beyond: int) -> None:
    if not (_is(Integral, beyond) and beyond >= 0):
        raise ConfigError("a whole number of at least zero is needed", key="beyond", value=beyond)


def _check_budget(budget: int | None, rank: int | None, ridge: float) -> None:
    if budget is None:
        return
    if not (_is(Integral, budget) and budget >= 1):
        raise ConfigError("a whole number from 1 on is needed", key="rank_budget", value=budget)
    if math.isinf(ridge):
        remedy = "Give a finite ridge, or a rank instead"
        raise ConfigError("a prior alone has no errors to share ranks out by", key="rank_budget", remedy=remedy)
    if rank is not None and rank < budget:
        raise ConfigError(
            f"no module is to have more than rank {rank}, so that they cannot have {budget} on average",
            key="rank_budget", remedy="Give a higher rank, or one of the two",
        )  # fmt: skip


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _prior(prior: str | Recipe | Adapter, plan: Plan) -> str | Adapter:
    """A single adapter is its own prior, and what is fitted then."""
    if isinstance(prior, Adapter):
        _check_shapes(prior, plan)
        return prior
    if len(plan.adapters) == 1:
        return next(iter(plan.adapters.values()))
    if isinstance(prior, str) and PRIORS[prior] is None:
        return prior
    return execute(replace(plan, recipe=plan.recipe.model_copy(update={"rank": None}))).adapter


def _check_shapes(prior: Adapter, plan: Plan) -> None:
    for name, planned in plan.modules.items():
        held = prior.modules.get(name)
        if held is None or held.shape != planned.module.shape:
            raise MismatchError(
                f"the prior has it as {held.shape if held else 'nothing'}, the adapters as {planned.module.shape}",
                key=name, remedy="Give a prior of the same base model and modules",
            )  # fmt: skip
