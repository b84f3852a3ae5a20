"""Models run block by block: the order that is seen, and what comes out behind stored states."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import nn

import kinds
from coremerge import Adapter
from coremerge.errors import OutputError
from coremerge.learning import fit
from coremerge.learning.backbone import backbone_output, frozen
from coremerge.learning.blocks import block_of
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
    seen, states = {}, {}
    with frozen(model), torch.no_grad():
        stream = Stream(model, targets, [("a", batches(family, seed=1)[0])])
        assert not stream.apart and not stream.repeated
        assert [name for segment in stream.segments for stage in segment.stages for name in stage]
        for at, segment in enumerate(stream.segments):
            states[segment.block] = stream.run(batch, at, states, {}, lambda n, x, *_: seen.update({n: x}))
        whole = whole_pass(model, targets, batch)
    assert len(seen) == len(targets)
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


class Counted(nn.Linear):
    """Counts how often it runs."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


class Looking(nn.Module):
    """Two stacks; the second begins with what blocks in the middle of the first gave."""

    def __init__(self, taken):
        super().__init__()
        self.seeing, self.saying = (nn.ModuleList(Counted(4, 4) for _ in range(count)) for count in (6, 2))
        self.taken = taken

    def forward(self, x):
        given = []
        for block in self.seeing:
            x = block(x)
            given.append(x)
        said = torch.stack([given[i] for i in self.taken]).sum(0)
        for block in self.saying:
            said = block(said)
        return said


@pytest.mark.parametrize("taken", [[1], [0, 2]])
def test_a_stack_of_whose_middle_others_take_is_not_run_again(taken):
    torch.manual_seed(0)
    model, x = Looking(taken).eval(), {"x": torch.randn(3, 4)}
    names = ["saying.0", "saying.1"]
    adapter = Adapter.from_updates({name: LowRank(torch.randn(4, 1), torch.randn(1, 4)) for name in names})
    seen, states = {}, {}
    with frozen(model), torch.no_grad():
        targets = MergedModel(model, {"a": adapter}).targets
        stream = Stream(model, targets, [("a", {"x": torch.randn(3, 4)})])
        before = model.seeing[0].runs
        for at, segment in enumerate(stream.segments):
            states[segment.block] = stream.run(x, at, states, {}, lambda n, z, *_: seen.update({n: z}))
            states = {block: given for block, given in states.items() if block in stream.tail(at)}
        runs = model.seeing[0].runs - before
        whole = whole_pass(model, targets, x)
    assert runs == 1 and not stream.apart and not stream.open
    kept = taken if len(taken) == 1 else range(6)
    assert stream.tail(5) == [f"seeing.{i}" for i in sorted({*kept, 4, 5})]
    for name, z in whole.items():
        torch.testing.assert_close(seen[name], z, msg=name)


def whole_pass(model, targets, batch):
    """Each target's input."""
    seen = {}
    with ExitStack() as undo:
        for name, target in targets.items():
            see = target.module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
            undo.callback(see.remove)
        backbone_output(model, batch)
    return seen


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", [*kinds.SHARING, "whisper", "dinov3_vit", "reader"])
def test_what_blocks_leave_for_later_ones_is_there_behind_stored_states(name, on_disk, tmp_path):
    kind = kinds.KINDS[name]
    model = kinds.make(kind)
    targets = MergedModel(model, kinds.adapters_of(model, kind.targets)).targets
    seen, states = {}, States(tmp_path if on_disk else None)
    with frozen(model), torch.no_grad():
        stream = Stream(model, targets, [("a", kinds.batch_of(kind, 1))])
        for at, segment in enumerate(stream.segments):
            finished = [one.block for one in stream.segments[:at]]
            held = {one: states[one] for one in finished if one in states}
            states[segment.block] = stream.run(kinds.batch_of(kind), at, held, {}, lambda n, x, *_: seen.update({n: x}))
            for old in finished:
                if old not in stream.tail(at):
                    states.drop(old)
        whole = whole_pass(model, targets, kinds.batch_of(kind))
    assert not stream.apart and len(seen) == len(targets)
    for target, x in whole.items():
        torch.testing.assert_close(seen[target], x, msg=target)


class Noting(nn.Module):
    """Blocks the last of which reads what the first one left: in a mapping by place, or where nobody sees it."""

    def __init__(self, hidden):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.hidden = hidden
        for i, block in enumerate(self.blocks):
            block.forward = partial(self.run, i, block.forward)

    def run(self, i, forward, x, notes):
        notes = self.kept if self.hidden else notes
        if i == 0:
            notes["first"] = x + 1
        return forward(x + notes.pop("first") if i == 4 else x)

    def forward(self, x):
        notes, self.kept = {}, {}
        for block in self.blocks:
            x = block(x, notes)
        return x


@pytest.mark.parametrize("hidden", [False, True])
def test_what_blocks_leave_where_nobody_sees_it_makes_a_stack_run_whole(hidden):
    torch.manual_seed(0)
    model, x = Noting(hidden).eval(), {"x": torch.randn(3, 4)}
    names = [f"blocks.{i}" for i in range(5)]
    adapter = Adapter.from_updates({name: LowRank(torch.randn(4, 1), torch.randn(1, 4)) for name in names})
    with frozen(model), torch.no_grad():
        stream = Stream(model, MergedModel(model, {"a": adapter}).targets, [("a", x)])
    assert stream.apart == (("blocks",) if hidden else ())
    assert [name for segment in stream.segments for stage in segment.stages for name in stage] == names


def test_inputs_of_several_kinds_show_the_order_together():
    """Pictures run one tower, texts the other, texts with pictures both and what comes behind."""
    clip, llava = kinds.make(kinds.CLIP), make_model("llava")
    samples = [("a", kinds.text(torch.Generator())), ("b", kinds.pictures()(torch.Generator()))]
    with frozen(clip), torch.no_grad():
        targets = MergedModel(clip, kinds.adapters_of(clip)).targets
        found = Stream(clip, targets, samples)
    assert {name for segment in found.segments for stage in segment.stages for name in stage} == set(targets)
    samples = [("a", batches("bert")[0]), ("b", batches("llava")[0])]
    with frozen(llava), torch.no_grad():
        targets = MergedModel(llava, kinds.adapters_of(llava)).targets
        orders = [Stream(llava, targets, listed).segments for listed in (samples, samples[::-1], samples[1:])]
    assert orders[0] == orders[1] == orders[2] and len({segment.stack for segment in orders[0]}) == 2


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


class Residual(nn.Module):
    """A block that works in place, or ends in a norm, and may be given something else besides."""

    def __init__(self, *, in_place=False, normed=False, inner=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4) if inner is None else inner
        self.norm = nn.LayerNorm(4) if normed else nn.Identity()
        self.in_place = in_place

    def forward(self, x, more=0):
        if self.in_place:
            x += torch.tanh(self.a(x))
            x += torch.tanh(self.b(x))
            return x
        return self.norm(x + self.b(torch.tanh(self.a(x))) + more)


class Odd(nn.Module):
    """Stacks that do not run as a row of blocks, each of which reads the one before it."""

    def __init__(self, how):
        super().__init__()
        self.how, shared = how, nn.Linear(4, 4)
        kinds = {
            "in place": {"in_place": True},
            "skip over norms": {"normed": True},
            "one layer in all": {"inner": shared},
        }
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Residual(**kinds.get(how, {})) for _ in range(5))
        self.later = nn.ModuleList(Residual(normed=True) for _ in range(2))
        self.end = nn.Sequential(nn.Linear(12 if how == "head of several" else 4, 4))

    def forward(self, x):
        x, given = self.first(x), []
        for i, block in enumerate(self.blocks):
            x = block(x, given[0]) if self.how == "skip over norms" and i == 4 else block(x)
            given.append(x)
        if self.how == "head of several":
            return self.end(torch.cat([given[0], given[2], given[4]], -1))
        x = given[1] if self.how == "norms behind a middle" else x
        for block in self.later:
            x = block(x)
        return self.end(x)


def whole_and_by_blocks(model, adapters, data, monkeypatch):
    """A fit's updates, block by block and with whole passes for every module."""
    found = [fit(model, adapters, data).adapter]
    with monkeypatch.context() as patch:
        patch.setattr("coremerge.learning.stream._blocks", lambda *_: iter(()))
        found.append(fit(model, adapters, data).adapter)
    return [{name: update.dense() for name, update in adapter.items()} for adapter in found]


def check_the_same(found):
    for name, update in found[1].items():
        torch.testing.assert_close(found[0][name], update, msg=name)


@pytest.mark.parametrize(
    "how", ["in place", "skip over norms", "one layer in all", "head of several", "norms behind a middle"]
)
def test_a_fit_is_that_of_whole_passes(how, monkeypatch):
    torch.manual_seed(0)
    model = Odd(how).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if how == "head of several":
        names = [name for name in names if not name.startswith("later")]
    adapters = {
        key: Adapter.from_updates(
            {
                name: LowRank(0.3 * torch.randn(layer.out_features, 1), 0.3 * torch.randn(1, layer.in_features))
                for name in names
                for layer in [model.get_submodule(name)]
            }
        )
        for key in "ab"
    }
    data = {key: [{"x": torch.randn(5, 3, 4)} for _ in range(3)] for key in "ab"}
    check_the_same(whole_and_by_blocks(model, adapters, data, monkeypatch))


def test_a_stack_within_a_sequence_of_layers_is_one():
    parts = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}), nn.Linear(4, 4)
    model = nn.ModuleDict({"net": nn.Sequential(*parts)})
    assert block_of(model, "net.0.layers.0") == ("net.0.layers", 0, 1) and block_of(model, "net.1") == ("net", 1, 2)


def test_batches_of_several_kinds_in_one_task(tmp_path, monkeypatch):
    """Texts that run no vision tower do not keep a task's images from it."""
    model = make_model("llava")
    adapters = {name: make_adapter("llava", tmp_path / name, seed) for seed, name in enumerate("ab")}
    images, texts = batches("llava"), batches("bert")
    data = {"a": [texts[0], images[0], texts[1], images[1]], "b": images}
    check_the_same(whole_and_by_blocks(model, adapters, data, monkeypatch))
