from typing import Annotated, Literal

import pytest
from pydantic import Field

from coremerge.errors import ConfigError
from coremerge.registry import Registry, parse_spec

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
    assert list(TOYS) == ["ball", "brick"]


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
