import pytest
import torch

import oracles
from coremerge import Adapter, Recipe, merge
from coremerge.errors import ConfigError
from coremerge.merging import MergeResult
from laws import close, lowrank

NAMES = {"layers.0.q": 0, "layers.1.q": 1, "layers.4.q": 4, "head": None}


def adapters(count: int = 2) -> list[Adapter]:
    return [
        Adapter.from_updates(
            {name: lowrank(9, 7, 2, seed=10 * t + i) for i, name in enumerate(NAMES)},
            name=f"a{t}",
        )
        for t in range(count)
    ]


def run(steps: list, batch: int = 1, **recipe: object) -> MergeResult:
    return merge(adapters(), Recipe(**{"scale": 1.0, "steps": steps, **recipe}), threads=1, batch=batch)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", ["sum", "ties", "whiten"])
def test_it_is_the_schedule_of_the_layers_after_any_method(method: str, batch: int) -> None:
    plain, found = (run(steps, batch, method=method).adapter for steps in ([], ["lines:alpha=0.2,beta=0.6"]))
    for name, layer in NAMES.items():
        close(found[name].dense(), oracles.lines(plain[name].dense(), layer, 4, 0.2, 0.6))


def test_over_evenly_spaced_layers_its_mean_is_1() -> None:
    update = lowrank(9, 7, 2)
    one = Adapter.from_updates({f"layers.{i}.q": update for i in range(5)})
    found = merge([one], Recipe(method="sum", steps=["lines"], scale=1.0), threads=1).adapter
    close(sum(x.dense() for x in found.values()) / 5, update.dense())
    close(found["layers.4.q"].dense(), 3 * found["layers.0.q"].dense())


def test_with_the_automatic_scale_only_the_ratio_counts() -> None:
    one, other = (run([step], scale="auto", method="sum").adapter for step in ("lines", "lines:alpha=5,beta=10"))
    for name in NAMES:
        close(one[name].dense(), other[name].dense())


def test_before_a_flattening_or_after_it_is_the_same() -> None:
    one, other = (run(steps, method="tsv").adapter for steps in (["lines", "isotropize"], ["isotropize", "lines"]))
    for name in NAMES:
        close(one[name].dense(), other[name].dense())


def test_without_layers_all_is_multiplied_by_alpha_and_a_first_layer_may_be_left_out() -> None:
    bare = [Adapter.from_updates({"head": lowrank(9, 7, 2, seed=t)}) for t in range(2)]
    plain, found = (
        merge(bare, Recipe(method="sum", steps=steps, scale=1.0), threads=1).adapter["head"].dense()
        for steps in ([], ["lines"])
    )
    close(found, 0.5 * plain)
    result = run(["lines:alpha=0,beta=1"], 8, method="sum")
    assert result.adapter["layers.0.q"].rank == 0
    assert result.adapter["layers.4.q"].rank == 4
    assert "nothing is left of the adapters in 2 of 4 modules" in result.report.warnings


def test_biases_go_along() -> None:
    update, bias = lowrank(6, 5, 2), torch.arange(6.0)
    one = Adapter.from_updates({"layers.0.q": update, "layers.2.q": update})
    one.biases = dict.fromkeys(one, bias)
    found = merge([one], Recipe(method="sum", steps=["lines"], scale=2.0), threads=1).adapter
    close(found.biases["layers.0.q"], 2 * 0.5 * bias.double())
    close(found.biases["layers.2.q"], 2 * 1.5 * bias.double())


def test_what_is_no_strength_is_refused() -> None:
    for beta in ("-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="not a value that step 'lines' takes"):
            run([f"lines:beta={beta}"])
