"""What a converter says of itself."""

from __future__ import annotations

from coremerge.bases import CONVERTERS


def test_every_one_says_where_its_weights_come_from() -> None:
    for name, converter in CONVERTERS.items():
        assert converter.name == name
        assert converter.hub_id
        if converter.package is None:
            assert set(converter.parts) < set(CONVERTERS)
        else:
            assert converter.files and "==" in str(converter.requirement)
            assert converter.package.replace("_", "-") == str(converter.requirement).split("==")[0]
