"""The estimate of hidden states beside what is really kept."""

from __future__ import annotations

import pytest
import torch

from coremerge.learning import fit
from coremerge.learning.room import IMAGE_TOKENS, WIDTH, state_bytes
from coremerge.learning.states import States
from coremerge.learning.stream import TAIL
from coremerge.plan import make_plan
from coremerge.recipe import Recipe
from families import batches, make_adapter, make_model


@pytest.fixture
def most(monkeypatch):
    """Bytes of all that was kept, whenever that changed."""
    put, found = States.__setitem__, []

    def count(self, key, tree):
        put(self, key, tree)
        found.append(sum(t.untyped_storage().nbytes() for _, tensors in self._kept.values() for t in tensors))

    monkeypatch.setattr(States, "__setitem__", count)
    return lambda: max(found)


@pytest.mark.parametrize("family", ["bert", "vit", "clip", "llama", "gpt2", "llava"])
def test_the_estimate_is_near(family, most, tmp_path):
    adapters = {key: make_adapter(family, tmp_path / key, i) for i, key in enumerate("ab")}
    data = {key: batches(family, 6, seed=i) for i, key in enumerate("ab")}
    model = make_model(family)
    fit(model, adapters, data)
    plan = make_plan(adapters, Recipe())
    estimated = state_bytes(model.config, plan, [batch for listed in data.values() for batch in listed])
    assert most() / 1.3 < estimated < 1.3 * most()


def test_what_a_model_does_not_say_is_assumed(tmp_path):
    plan = make_plan({"a": make_adapter("bert", tmp_path / "a", 1)}, Recipe())
    per_token = 3 * 3  # of a block's three modules
    text, image = {"input_ids": torch.ones(2, 5)}, {"pixel_values": torch.ones(2, 3, 8, 8)}
    assert state_bytes(None, plan, [text], 2) == 10 * (2 * TAIL * WIDTH * 2 + per_token * 4)
    assert state_bytes(None, plan, [image]) == 2 * IMAGE_TOKENS * 4 * (2 * TAIL * WIDTH + per_token)
    patches = {"pixel_values": torch.ones(40, 12)}
    assert state_bytes(None, plan, [patches]) == 40 * 4 * (2 * TAIL * WIDTH + per_token)
