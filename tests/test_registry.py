import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from coremerge.errors import ConfigError
from coremerge.methods import METHODS
from coremerge.registry import Registry, parse_spec
from coremerge.spaces import SPACES
from coremerge.steps import STEPS

TOYS: Registry[tuple] = Registry("toy")


@TOYS.register("ball", unitary=True, source="a paper")
def ball(
    size: Annotated[float, Field(gt=0, le=1)] = 0.5,
    colour: Literal["red", "blue"] = "red",
    count: int | None = None,
    soft: bool = False,
) -> tuple:
    """Rolls.

    More.
    """
    return size, colour, count, soft


@TOYS.register("brick")
def brick(weight: int) -> tuple:
    return (weight,)


def test_an_entry_is_read_from_its_factory() -> None:
    entry = TOYS["ball"]
    assert entry.help == "Rolls."
    assert entry.parameters == {"size": 0.5, "colour": "red", "count": None, "soft": False}
    assert (entry.unitary, entry.elementwise, entry.linear, entry.source) == (True, False, False, "a paper")
    assert TOYS["brick"].help == ""
    assert list(TOYS)[:2] == ["ball", "brick"]


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("ball", (0.5, "red", None, False)),
        ("ball:size=0.25,colour=blue", (0.25, "blue", None, False)),
        ("ball:count=3, soft=true", (0.5, "red", 3, True)),
        ("ball:count=none", (0.5, "red", None, False)),
        ({"ball": {"size": 1, "count": "Null", "soft": "false"}}, (1.0, "red", None, False)),
        ({"ball": None}, (0.5, "red", None, False)),
        ("brick:weight=2", (2,)),
    ],
)
def test_a_spec_is_converted_to_the_annotated_types(spec: object, made: tuple) -> None:
    assert TOYS.build(spec) == made  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bal", "there is no toy 'bal'. Did you mean 'ball'\\? Known: ball, brick"),
        ("xyz", "there is no toy 'xyz'. Known"),
        ("ball:sise=1", "toy 'ball' has no parameter 'sise'. It takes: size, colour"),
        ("ball:size=0", "size = \"0\": not a value that toy 'ball' takes: .*greater than 0"),
        ("ball:size=nan", "not a value"),
        ("ball:size=much", "not a value"),
        ("ball:colour=green", "'red' or 'blue'"),
        ("ball:soft=perhaps", "not a value"),
        ({"ball": {"count": True}}, "count = true: not a value that toy 'ball' takes"),
        ("ball:size", "Write ball:key=value"),
        ("brick", "toy 'brick' needs 'weight'. Write brick:weight=value"),
        ({"ball": {}, "brick": {}}, "one name with its parameters"),
        ({}, "one name with its parameters"),
    ],
)
def test_a_wrong_spec_is_refused(spec: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TOYS.build(spec)  # type: ignore[arg-type]


def test_parameters_of_a_spec_are_copied() -> None:
    given = {"ball": {"size": 1}}
    parse_spec(given)[1]["size"] = 2
    assert given == {"ball": {"size": 1}}


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("ball", "ball"),
        ("ball:soft=no", "ball:soft=false"),
        ("ball:soft=0, count=4.0", "ball:soft=false,count=4"),
        ("ball:count=None,colour=blue", "ball:count=none,colour=blue"),
        ({"ball": None}, {"ball": None}),
        ({"ball": {"soft": "off", "count": "4"}}, {"ball": {"soft": False, "count": 4}}),
    ],
)
def test_a_spec_keeps_its_spelling_and_has_validated_values(spec: object, kept: object) -> None:
    found = TOYS.canonical(spec)  # type: ignore[arg-type]
    assert found == kept
    assert TOYS.canonical(found) == found
    assert TOYS.build(found) == TOYS.build(spec)  # type: ignore[arg-type]


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is a toy 'ball' already"):
        TOYS.register("ball")(brick)
    with pytest.raises(ConfigError, match="there is a method 'sum' already"):
        METHODS.register("sum", unitary=True)(METHODS["mean"].factory)
    assert TOYS["ball"].factory is ball


@TOYS.register(
    "spring",
    unitary=True,
    dense=lambda values: values["soft"],
    spreads=lambda values: values["soft"],
    keeps=lambda values: values["turns"],
)
def spring(turns: int | None = None, soft: bool = False) -> tuple:
    return turns, soft


@pytest.mark.parametrize("said", ["yes", "on", 1, "true", True])
def test_what_an_operator_declares_follows_its_validated_parameters(said: object) -> None:
    soft, plain = (TOYS.resolve({"spring": {"soft": x, "turns": "4.0"}}) for x in (said, "off"))
    assert (soft.dense, soft.spreads, soft.keeps) == (True, True, 4)
    assert (plain.dense, plain.spreads, plain.keeps) == (False, False, 4)
    assert str(soft) == "spring (soft=true, turns=4)"
    assert plain.values == {"turns": 4, "soft": False}
    assert plain.cuts == ("keeps at most 4 directions",)
    assert TOYS.resolve("spring:turns=None").cuts == TOYS.resolve("spring").cuts == ()


def test_what_is_not_declared_is_taken_from_what_is() -> None:
    ball_, brick_ = TOYS.resolve("ball"), TOYS.resolve("brick:weight=1")
    assert (ball_.dense, ball_.spreads, ball_.keeps) == (False, False, None)
    assert brick_.spreads


def compared(tree: ast.AST) -> Iterator[str]:
    """Texts that a value is compared with: by an operator, in a pattern, by its beginning, or by a table of choices."""
    for node in ast.walk(tree):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                sides = list(node.args)
            elif isinstance(node.func.value, ast.Dict):
                sides = [key for key in node.func.value.keys if key]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            sides = [key for key in node.value.keys if key]
        for side in sides:
            literal = side if isinstance(side, (ast.Constant, ast.Tuple, ast.List, ast.Set)) else ast.Tuple([])
            yield from (n.value for n in ast.walk(literal) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_nobody_else_asks_for_an_operators_name() -> None:
    source = Path(__file__).parents[1] / "src" / "coremerge"
    homes = {"methods", "spaces", "steps"}
    names = {*METHODS, *SPACES, *STEPS}
    files = [file for file in source.rglob("*.py") if file.relative_to(source).parts[0] not in homes]
    found = {file.name: names & {*compared(ast.parse(file.read_text(encoding="utf-8")))} for file in files}
    assert {name: asked for name, asked in found.items() if asked} == {}
    for text in ("x == 'tsv'", "x in ('a', 'tsv')", "x.startswith('tsv')", "{'tsv': 1}.get(x)", "{'tsv': 1}[x]"):
        assert set(compared(ast.parse(text))) >= {"tsv"}
