"""Module names as patterns."""

from __future__ import annotations

from coremerge.patterns import group, listed


def test_groups_are_of_modules_that_are_alike():
    names = [f"h.{i}.mlp.{j}.fc" for i in range(3) for j in (0, 2)]
    groups = group({**dict.fromkeys(names, 1), "h.1.mlp.0.fc": 2, "head2": 1})
    assert [(g.pattern, len(g.names), g.alike) for g in groups] == [
        ("h.[0-2].mlp.[0,2].fc", 5, 1),
        ("h.1.mlp.0.fc", 1, 2),
        ("head2", 1, 1),
    ]


def test_what_is_said_of_modules_is_said_once_a_pattern():
    names = [f"layers.{i}.{part}_proj" for i in range(3) for part in "qv"]
    assert listed(dict.fromkeys(names, "")) == "layers.[0-2].q_proj, layers.[0-2].v_proj"
    assert listed({**dict.fromkeys(names, ""), "layers.1.q_proj": " (a)"}, most=2) == (
        "layers.[0,2].q_proj, layers.[0-2].v_proj and 1 more"
    )
