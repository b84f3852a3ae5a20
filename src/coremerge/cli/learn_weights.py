"""coremerge learn-weights: merge weights from a few unlabelled inputs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge.cli import _data
from coremerge.cli._base import BaseDtype
from coremerge.cli._cluster import Address, ExecutorName, Gpus
from coremerge.cli._output import facts, number, print_json, progress_bar, remark, say, table

if TYPE_CHECKING:
    from coremerge.adapter import Adapter
    from coremerge.learning import Weights
    from coremerge.learning.rows import Example

SHOWN = 4
"""Tasks whose objective has room beside the bar; of more, the highest is shown."""


def learn_weights(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapters: folders, files, URLs or hub ids.", metavar="ADAPTER", show_default=False),
    ],
    *,
    base: Annotated[str, typer.Option(help="The base model: a folder or a hub id.", metavar="MODEL")],
    data: Annotated[list[str], typer.Option(help=_data.HELP, metavar=_data.METAVAR)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", metavar="WEIGHTS.safetensors")],
    objective: Annotated[
        str | None, typer.Option(help="match (default), nsc-own or nsc.", metavar="OBJECTIVE", show_default=False)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings: match, nsc-own; NSC as in its paper: language (default where tokens are read) or vision.",
            metavar="PRESET",
            show_default=False,
        ),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="That are measured: all, last-quarter, or a pattern such as '*.v_proj'.", metavar="WHICH"),
    ] = None,
    per: Annotated[
        str | None, typer.Option(help="A weight per adapter, module (default) or component.", metavar="WHAT")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimiser.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate.")] = None,
    start: Annotated[float | None, typer.Option(help="Of every weight. Default: 2.4 / adapters, at most 1.")] = None,
    pull: Annotated[float | None, typer.Option(min=0.0, help="Towards the start.")] = None,
    bounds: Annotated[str | None, typer.Option(help="That weights are kept within.", metavar="LOW,HIGH")] = None,
    fixed_total: Annotated[
        bool | None, typer.Option("--fixed-total", help="Keep the sum of each module's weights.", show_default=False)
    ] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps without progress.")] = None,
    preference: Annotated[
        list[str] | None, typer.Option(help="Weight of a task in the objective; 1 by default.", metavar="NAME=NUMBER")
    ] = None,
    count: Annotated[int, typer.Option("--inputs", min=1, help="Drawn for each task.")] = 64,
    size: Annotated[int, typer.Option("--batch", min=1, help="Inputs that go together.")] = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of an input.")] = None,
    base_dtype: BaseDtype = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="The same, as it was called.", hidden=True)] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute in bfloat16.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: over all there are.")] = "cpu",
    executor: ExecutorName = "local",
    address: Address = None,
    gpus: Gpus = 1,
    seed: Annotated[int, typer.Option(help="Of the draw of inputs.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from a file that was written before.", metavar="WEIGHTS.safetensors")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read legacy .bin files, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Learn merge weights without labels.

    From a few inputs of every adapter's task; the base model is run and not changed. Ctrl-C ends it early and keeps
    what was learned; --resume goes on.
    """
    from coremerge.cli import _options
    from coremerge.inputs import by_label, read_adapters
    from coremerge.learning.result import check_output, read_weights

    check_output(out, overwrite=overwrite)
    settings = {
        "objective": objective,
        "preset": preset,
        "modules": modules,
        "per": _options.one_of(per, ("adapter", "module", "component"), "--per"),
        "steps": steps,
        "rate": rate,
        "start": start,
        "pull": pull,
        "bounds": _options.interval(bounds, "--bounds"),
        "fixed_total": fixed_total,
        "patience": patience,
    }
    elsewhere = _options.executor(executor, address, device, gpus)
    with progress_bar(quiet) as bar, interruptible() as stopped, elsewhere as cluster:
        read = read_adapters(adapters, base=base, allow_pickle=allow_pickle, progress=bar)
        weights = learned(
            read,
            base,
            _data.inputs_of(data, read, adapters),
            bar,
            stopped,
            preferences=by_label(_options.numbers(preference, "--preference"), read, adapters),
            count=count,
            size=size,
            max_length=max_length,
            dtype=dtype or base_dtype,
            autocast=autocast,
            checkpointing=checkpointing,
            device=device,
            seed=seed,
            resume=read_weights(resume) if resume else None,
            executor=cluster,
            **{key: value for key, value in settings.items() if value is not None},
        )
    weights.save(out, overwrite=overwrite)
    _show(weights, out, as_json, quiet)


def learned(
    adapters: Mapping[str, Adapter],
    base: str,
    data: Mapping[str, str | list[Example]],
    bar: Callable[[str, int, int], None],
    stopped: Callable[[], bool],
    *,
    autocast: bool = False,
    **settings: Any,
) -> Weights:
    """The weights, with a bar of the steps."""
    import torch

    from coremerge.learning.files import learn_files

    bar("loading the base model", 0, 1)

    def progress(done: int, total: int, losses: Mapping[str, float]) -> bool:
        mean, highest = sum(losses.values()) / len(losses), max(losses, key=losses.__getitem__)
        shown = losses if len(losses) <= SHOWN else {f"highest: {highest}": losses[highest]}
        each = ", ".join(f"{name} {number(value)}" for name, value in shown.items())
        bar(f"objective {number(mean)} ({each})", done, total)
        return not stopped()

    kind = torch.bfloat16 if autocast else None
    return learn_files(adapters, base, data, autocast=kind, progress=progress, **settings)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C: the first asks for an end after the step, the second ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _show(weights: Weights, out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({**weights.to_dict(), "path": str(out)})
    elif not quiet:
        say(_text(weights, out))
    if not quiet:
        for note in weights.notes:
            remark("note", note)


def _text(weights: Weights, out: Path) -> str:
    first, last = (dict(zip(weights.tasks, weights.objective[at].tolist(), strict=True)) for at in (0, -1))
    rows = [
        [name, number(mean), f"{number(low)} to {number(high)}", *_of_task(name, first, last)]
        for name, (mean, low, high) in weights.summary().items()
    ]
    wanted = weights.settings["steps"]
    return "\n\n".join(
        (
            table(
                ["adapter", "mean weight", "range", "objective at the start", "at the end"], rows, right=(1, 2, 3, 4)
            ),
            facts(
                [
                    ("objective", weights.settings["objective"]),
                    ("steps", weights.steps if weights.steps == wanted else f"{weights.steps} of {wanted}"),
                    ("written to", out),
                    ("use", f"coremerge merge ... --method sum --scale 1 --weights {out}"),
                ]
            ),
        )
    )


def _of_task(name: str, first: Mapping[str, float], last: Mapping[str, float]) -> tuple[str, str]:
    return (number(first[name]), number(last[name])) if name in first else ("no inputs", "")
