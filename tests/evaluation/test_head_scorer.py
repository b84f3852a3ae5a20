"""Tasks on images of one tiny vision tower: whole, in several numbers, and pixel by pixel."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from coremerge import load
from coremerge.errors import ConfigError, TensorError
from coremerge.evaluation import Evaluator, evaluate, read_taskset
from coremerge.evaluation.metrics import METRICS
from coremerge.learning import learn_weights
from families import make_adapter, make_model
from made import clip_pictures, jsonl
from tolerances import SINGLE

ROWS, WIDTH, SIDE, GRID = 20, 16, 3, 2
"""Images, numbers of a feature, pixels of a map a patch and side, patches a side."""
MAP = SIDE * GRID
DRAW = np.random.default_rng(0)
MAPS = {
    "depth": DRAW.integers(0, 65536, (ROWS, MAP, MAP)).astype(np.uint16),
    "mask": DRAW.integers(0, 2, (ROWS, MAP, MAP)).astype(np.uint8),
    "normal": DRAW.integers(0, 256, (ROWS, MAP, MAP, 3)).astype(np.uint8),
}
MAPS["normal"][:, 0, 0] = 128  # no direction
PLACE = DRAW.normal(size=(ROWS, 2))
TASKS: dict[str, dict[str, Any]] = {
    "shade": {"kind": "classification", "metric": "accuracy", "classes": ["dark", "light"]},
    "place": {"kind": "regression", "metric": "pearson", "outputs": 2},
    "turn": {"kind": "regression", "metric": "angular_error", "outputs": 2},
    "depth": {"kind": "regression", "metric": "r2", "per": "pixel"},
    "mask": {"kind": "classification", "metric": "iou", "per": "pixel", "classes": ["ground", "thing"]},
    "normal": {"kind": "regression", "metric": "angular_error", "per": "pixel", "outputs": 3},
}


def outputs_of(name: str) -> int:
    task = TASKS[name]
    channels = len(task.get("classes", ())) or task.get("outputs", 1)
    return channels * (SIDE**2 if "per" in task else 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vision tower of 2 × 2 patches; six tasks, all on the same images; tests must not change it."""
    folder = tmp_path_factory.mktemp("maps")
    make_model("clip").save_pretrained(folder / "base")
    clip_pictures().save_pretrained(folder / "base")
    torch.manual_seed(0)
    for at in range(ROWS):
        Image.fromarray(DRAW.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"{at}.png")
        for name, maps in MAPS.items():
            Image.fromarray(maps[at]).save(folder / f"{name}{at}.png")
    tasks = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        make_adapter("clip", folder / name, seed)
        outputs = outputs_of(name)
        head = {"weight": torch.randn(outputs, WIDTH), "bias": torch.randn(outputs)}
        save_file(head, folder / f"{name}.safetensors")
        jsonl(folder / f"{name}.jsonl", *({"image": f"{at}.png", "label": label(name, at)} for at in range(ROWS)))
        files = {"adapter": name, "head": f"{name}.safetensors", "test": f"{name}.jsonl"}
        tasks[name] = task | files
    described = {"name": "maps", "base": {"path": "base"}, "pooling": "mean", "tasks": tasks}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    return folder


def label(name: str, at: int) -> Any:
    if name == "shade":
        return "light" if at % 2 else "dark"
    return f"{name}{at}.png" if name in MAPS else PLACE[at].tolist()


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Evaluator:
    taskset = read_taskset(folder)
    return Evaluator(taskset, {name: load(path) for name, path in taskset.own().items()})


@contextmanager
def passes(evaluator: Evaluator) -> Iterator[list[int]]:
    """How many rows went through the model, batch by batch."""
    counted: list[int] = []

    def count(module: Any, args: Any, kwargs: Mapping[str, Tensor]) -> None:
        counted.append(len(kwargs["pixel_values"]))

    handle = evaluator.encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


def by_hand(evaluator: Evaluator, name: str, adapter: str) -> Tensor:
    """What the head of a task gives for each pixel: (rows, height, width, channels)."""
    rows = evaluator.taskset.rows(name, "test")
    with evaluator.encoder.carrying(evaluator.adapters[adapter]):
        tokens = evaluator.encoder.features(evaluator.encoder.batches(rows), "patches")
    head = evaluator.heads[name]
    maps = torch.zeros(ROWS, MAP, MAP, outputs_of(name) // SIDE**2)
    for patch, out in enumerate((tokens[:, 1:] @ head.weight.T + head.bias).unbind(1)):  # behind the class's token
        y, x = SIDE * (patch // GRID), SIDE * (patch % GRID)
        maps[:, y : y + SIDE, x : x + SIDE] = out.reshape(ROWS, SIDE, SIDE, -1)
    return maps


def test_maps_are_scored_pixel_by_pixel(evaluator: Evaluator) -> None:
    raw = evaluator.score(evaluator.adapters["shade"], "test").raw
    depth = by_hand(evaluator, "depth", "shade")[..., 0].numpy().reshape(ROWS, -1)
    right = (MAPS["depth"] / 65535).reshape(ROWS, -1)
    explained = 1 - ((depth - right) ** 2).sum() / ((right - right.mean(0)) ** 2).sum()
    assert raw["depth"] == pytest.approx(explained, rel=SINGLE)
    guesses = by_hand(evaluator, "mask", "shade").argmax(-1).numpy() == 1
    thing = MAPS["mask"] == 1
    assert raw["mask"] == pytest.approx((guesses & thing).sum() / (guesses | thing).sum())
    normals = 2 * by_hand(evaluator, "normal", "shade").numpy() - 1
    truth = MAPS["normal"] / 127.5 - 1
    cosines = (normals * truth).sum(-1) / np.linalg.norm(normals, axis=-1) / np.linalg.norm(truth, axis=-1)
    counts = np.linalg.norm(truth, axis=-1) >= 0.5
    assert not counts[:, 0, 0].any()
    assert raw["normal"] == pytest.approx(np.degrees(np.arccos(cosines[counts])).mean(), rel=1e-4)  # near 0 of arccos


def test_several_numbers_a_row_are_scored_together(evaluator: Evaluator) -> None:
    raw = evaluator.score({}, "test").raw
    features = evaluator.embeddings({}, "test")["place"]
    guesses = evaluator.heads["place"](features).numpy()
    expected = [np.corrcoef(guesses[:, i], PLACE[:, i])[0, 1] for i in range(2)]
    assert raw["place"] == pytest.approx(np.mean(expected), abs=SINGLE)
    turned = evaluator.heads["turn"](features).numpy()
    angles = METRICS["angular_error"].score(turned[:, None], PLACE[:, None])
    assert raw["turn"] == pytest.approx(angles)


def test_tasks_of_the_same_images_share_one_pass(evaluator: Evaluator) -> None:
    evaluator.own("test")
    with passes(evaluator) as counted:
        evaluator.score(evaluator.adapters["depth"], "test")
    assert sum(counted) == ROWS
    with passes(evaluator) as counted:
        found = evaluator.embeddings({}, "test")
    assert sum(counted) == ROWS
    assert {name: tuple(one.shape[1:]) for name, one in found.items()} == {
        "shade": (WIDTH,), "place": (WIDTH,), "turn": (WIDTH,),
        "depth": (GRID**2, WIDTH), "mask": (GRID**2, WIDTH), "normal": (GRID**2, WIDTH),
    }  # fmt: skip


def test_each_own_adapter_takes_a_pass_of_its_own_once(folder: Path) -> None:
    taskset = read_taskset(folder)
    evaluator = Evaluator(taskset, {name: load(path) for name, path in taskset.own().items()})
    with passes(evaluator) as counted:
        evaluator.own("test")
        evaluator.own("test")
    assert sum(counted) == ROWS * len(TASKS)


def test_an_evaluator_of_fewer_tasks_is_the_same_but_for_the_others(evaluator: Evaluator) -> None:
    update, wanted = evaluator.adapters["depth"], ["shade", "mask"]
    whole, own = evaluator.score(update, "test"), evaluator.own("test")
    part = evaluator.only(wanted)
    with passes(evaluator) as counted:
        found = part.score(update, "test")
    assert sum(counted) == ROWS, "the own adapters are not scored again"
    assert found.raw == {name: whole.raw[name] for name in wanted}
    assert found.normalised == {name: whole.normalised[name] for name in wanted}
    assert part.own("test").raw == {name: own.raw[name] for name in wanted}
    assert set(part.heads) == set(part.adapters) == set(part.embeddings({}, "test")) == set(wanted)
    assert evaluator.score(update, "test") == whole
    with pytest.raises(ConfigError, match="no such task"):
        evaluator.only(["nothing"])


def test_a_shared_pass_sees_the_weights_of_the_moment(evaluator: Evaluator) -> None:
    own = evaluator.own("test")
    for name, adapter in evaluator.adapters.items():
        assert evaluator.score(adapter, "test").raw[name] == own.raw[name]
    assert len({evaluator.score(adapter, "test").raw["depth"] for adapter in evaluator.adapters.values()}) == len(TASKS)


def test_images_are_opened_once_for_all_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = Image.open

    def count(file: Any, *args: Any) -> Any:
        opened.append(Path(file).name)
        return original(file, *args)

    monkeypatch.setattr(Image, "open", count)
    evaluator = Evaluator(read_taskset(folder), {})
    for _ in range(2):
        evaluator.score({}, "test")
    assert sorted(opened) == sorted(f"{kind}{at}.png" for kind in ("", *MAPS) for at in range(ROWS))


def test_other_images_or_another_order_take_another_pass(folder: Path) -> None:
    lines = (folder / "shade.jsonl").read_text().splitlines()
    (folder / "turned.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    taskset = read_taskset(folder)
    tasks = {
        "shade": taskset.tasks["shade"],
        "turned": taskset.tasks["shade"].model_copy(update={"test": "turned.jsonl"}),
    }
    evaluator = Evaluator(taskset.model_copy(update={"tasks": tasks}), {})
    with passes(evaluator) as counted:
        scores = evaluator.score({}, "test")
    assert sum(counted) == 2 * ROWS
    assert scores.raw["shade"] == scores.raw["turned"]


def test_features_are_dropped_after_their_tasks(folder: Path) -> None:
    """Of several sets of images one set's features are in memory at a time."""
    for at in range(3):
        jsonl(folder / f"depth.{at}.jsonl", *(
            {"image": f"{i}.png", "label": f"depth{i}.png"} for i in range(at, at + 12)
        ))  # fmt: skip
    taskset = read_taskset(folder)
    depth = taskset.tasks["depth"]
    tasks = {f"depth {at}": depth.model_copy(update={"test": f"depth.{at}.jsonl"}) for at in range(3)}
    evaluator = Evaluator(taskset.model_copy(update={"tasks": tasks}), {})
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original = evaluator.encoder.pooled

    def watched(*given: Any) -> dict[str, Tensor]:
        alive.append(sum(one() is not None for one in made))
        arrays = {pooling: one.numpy().copy() for pooling, one in original(*given).items()}
        made.extend(map(weakref.ref, arrays.values()))
        return {
            pooling: torch.from_numpy(one) for pooling, one in arrays.items()
        }  # keeps the array as long as its bytes

    evaluator.encoder.pooled = watched  # type: ignore[method-assign]
    evaluator.score({}, "test")
    assert alive == [0, 0, 0]


def test_classifiers_give_the_logits_that_predictions_are_made_of(evaluator: Evaluator) -> None:
    encoder, classifiers = evaluator.encoder, evaluator.classifiers()
    assert list(classifiers) == ["shade", "mask"]
    ((places, batch), *_) = encoder.batches(evaluator.taskset.rows("shade", "test"), ROWS)
    output = encoder.model(**batch)
    features = encoder.features([(places, batch)])
    torch.testing.assert_close(
        classifiers["shade"](output, batch)[places.argsort()], evaluator.heads["shade"](features)
    )
    logits = classifiers["mask"](output, batch)
    assert logits.shape == (ROWS, GRID**2, SIDE**2, 2)


@pytest.mark.parametrize("objective", ["entropy", "match", "nsc-own"])
def test_weights_are_learned_on_images(evaluator: Evaluator, objective: str) -> None:
    adapters = {name: evaluator.adapters[name] for name in ("shade", "mask")}
    rows = {name: evaluator.taskset.rows(name, "test") for name in adapters}
    data = {name: [batch for _, batch in evaluator.encoder.batches(rows[name], 8)] for name in adapters}
    found = learn_weights(
        evaluator.encoder.model, adapters, data, objective=objective, steps=2, heads=evaluator.classifiers()
    )
    assert found.flat().isfinite().all()


def test_errors_are_turned_round_and_have_intervals(folder: Path) -> None:
    result = evaluate([folder / "depth"], folder)
    scores, own = result["depth"].scores, result.rows[0].scores
    assert scores.normalised["normal"] == own.raw["normal"] / scores.raw["normal"]
    for name, (low, high) in scores.intervals.items():
        assert low <= scores.raw[name] <= high, name
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5, 6), r"maps of 6 × 5, which 3 pixels a patch and side do not divide.*3 × 3 pixels a patch"),
        ((9, 9), "maps for 9 patches, and the base model sees 4"),
        ((3, 3), "maps for 1 patches, and the base model sees 4"),
    ],
)
def test_maps_that_do_not_fit_the_patches_are_refused(folder: Path, size: tuple[int, int], message: str) -> None:
    Image.new("L", size).save(folder / "wrong.png")
    jsonl(folder / "wrong.jsonl", *({"image": f"{at}.png", "label": "wrong.png"} for at in range(3)))
    taskset = read_taskset(folder)
    wrong = taskset.tasks["depth"].model_copy(update={"test": "wrong.jsonl"})
    with pytest.raises(ConfigError, match=rf"tasks\.depth: {message}"):
        Evaluator(taskset.model_copy(update={"tasks": {"depth": wrong}}), {}).score({}, "test")


def test_a_head_of_maps_that_is_no_square_is_refused(folder: Path) -> None:
    save_file({"weight": torch.ones(6, WIDTH)}, folder / "six.safetensors")
    taskset = read_taskset(folder)
    wrong = taskset.tasks["normal"].model_copy(update={"head": "six.safetensors"})
    with pytest.raises(TensorError, match=r"six\.safetensors: the head has 6 outputs, the task 3 times a square"):
        Evaluator(taskset.model_copy(update={"tasks": {"normal": wrong}}), {})
