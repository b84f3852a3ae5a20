"""Models run block by block: the order that is seen, and what comes out behind stored states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coremerge import Adapter
from coremerge.errors import OutputError
from coremerge.learning.backbone import backbone_output, frozen
from coremerge.learning.forward import MergedModel
from coremerge.learning.states import States
from coremerge.learning.stream import Stream
from coremerge.lowrank import LowRank
from families import FAMILIES, batches, make_adapter, make_model


def nothing(*_):
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_give_what_a_pass_gives(family, tmp_path):
    model, batch = make_model(family), batches(family)[0]
    targets = MergedModel(model, {"a": make_adapter(family, tmp_path, 0)}).targets
    seen, whole, states = {}, {}, {}
    with frozen(model), torch.no_grad():
        stream = Stream(model, targets, [("a", batches(family, seed=1)[0])])
        assert not stream.apart and not stream.repeated
        assert [name for segment in stream.segments for stage in segment.stages for name in stage]
        for at, segment in enumerate(stream.segments):
            states[segment.block] = stream.run(batch, at, states, {}, lambda n, x, *_: seen.update({n: x}))
        hooks = [
            target.module.register_forward_hook(lambda m, args, out, name=name: whole.update({name: args[0]}))
            for name, target in targets.items()
        ]
        backbone_output(model, batch)
    assert len(hooks) == len(seen) == len(targets)
    for name, x in whole.items():
        torch.testing.assert_close(seen[name], x, msg=name)


def test_targets_that_share_an_input_are_one_stage(tmp_path):
    model = make_model("llama")
    with frozen(model), torch.no_grad():
        targets = MergedModel(model, {"a": make_adapter("llama", tmp_path, 0)}).targets
        stream = Stream(model, targets, [("a", batches("llama")[0])])
    assert [segment.block for segment in stream.segments] == [f"model.layers.{i}" for i in range(4)]
    parts = [tuple(name.rsplit(".", 1)[-1] for name in stage) for stage in stream.segments[0].stages]
    assert parts == [("q_proj", "v_proj"), ("down_proj",)]


def test_it_stops_once_the_targets_are_reached(tmp_path):
    model = make_model("llama")
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    with frozen(model), torch.no_grad():
        targets = MergedModel(model, {"a": make_adapter("llama", tmp_path, 0)}).targets
        stream = Stream(model, targets, [("a", batches("llama")[0])])
        ran.clear()
        first = stream.segments[0].stages[0]
        assert stream.run(batches("llama")[0], 0, {}, {}, nothing, until=first) is None
    assert not ran


class Reaching(nn.Module):
    """Blocks the last of which also reads what the first one gave."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.end = nn.Linear(4, 4)

    def forward(self, x):
        first = self.blocks[0](x)
        for block in self.blocks[1:3]:
            x = block(first if x is None else x)
        return self.end(self.blocks[3](x + first))


def test_a_stack_that_reaches_back_runs_whole():
    torch.manual_seed(0)
    model, x = Reaching().eval(), {"x": torch.randn(3, 4)}
    names = ["blocks.2", "blocks.3", "end"]
    adapter = Adapter.from_updates({name: LowRank(torch.randn(4, 1), torch.randn(1, 4)) for name in names})
    with frozen(model), torch.no_grad():
        stream = Stream(model, MergedModel(model, {"a": adapter}).targets, [("a", x)])
    assert stream.apart == ("blocks",)
    assert [segment.stages for segment in stream.segments] == [((name,),) for name in names]


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_come_back_as_they_were(on_disk, tmp_path):
    states = States(tmp_path if on_disk else None)
    tree = (torch.randn(2, 3).bfloat16(), None, [torch.arange(3), {"x": torch.zeros(0)}], "word")
    states["key", 1] = tree
    states["key", 2] = torch.ones(2)
    for _ in range(2):
        a, none, (b, inner), word = states["key", 1]
        assert torch.equal(a, tree[0]) and a.dtype == torch.bfloat16 and torch.equal(b, tree[2][0])
        assert none is None and word == "word" and inner["x"].shape == (0,)
        states["key", 1] = tree
    assert ("key", 1) in states and ("key", 3) not in states
    states.drop(("key", 1))
    states.drop(("key", 3))
    assert ("key", 1) not in states and torch.equal(states["key", 2], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == on_disk


def test_a_folder_for_states_that_goes_is_said(tmp_path):
    states = States(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"gone: hidden states do not go there: .*No such file.*--spill"):
        states["a"] = torch.ones(2)
