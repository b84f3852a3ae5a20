"""Merged modules that wait for their turn to be written."""

from __future__ import annotations

import pytest
import torch

from coremerge import LowRank, Recipe
from coremerge.formats import load
from coremerge.formats.journal import Journal
from coremerge.held import Held
from coremerge.merging import execute, solve
from coremerge.pipeline import merge_files
from coremerge.plan import make_plan
from tiny import make_adapter


@pytest.fixture
def plan(tmp_path):
    return make_plan([load(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("AB")], Recipe())


def equal(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


@pytest.mark.parametrize("most", [0, 3000, 1 << 30])
def test_cores_that_wait_on_the_disk_give_the_same_numbers(plan, tmp_path, most):
    expected = execute(plan).adapter
    held = Held(folder=tmp_path, most=most)
    result = execute(plan, held=held)
    assert list(held) and held.keys() == plan.modules.keys() and "nothing" not in held
    assert all(equal(result.adapter[name], expected[name]) for name in expected)
    assert not any(".coremerge" in file.name for file in tmp_path.iterdir())  # the file has no name
    held.close()


def test_memory_holds_what_fits_and_the_disk_the_rest(plan, tmp_path):
    names = list(plan.modules)
    solved = {name: one for at in names for name, one in solve((at,), plan, plan.recipe.parts()).items()}
    size = max(one.combination.left.nbytes + one.combination.right.nbytes for one in solved.values())
    held = Held(folder=tmp_path, most=size)
    held.add(solved)
    assert 1 <= len(held._memory) < len(names) == len(held._memory) + len(held._parts)
    assert held.reports == {name: one.report for name, one in solved.items()}
    held.close()
    with pytest.raises(KeyError):
        held["nothing"]


def test_a_journal_gives_back_what_it_was_given(plan, tmp_path):
    with Journal(tmp_path / "journal", "mark") as journal:
        first = Held(journal)
        execute(plan, held=first)
    with Journal(tmp_path / "journal", "mark") as journal:
        again = Held(journal)
        for part in journal.parts:
            again.take(part)
        result = execute(plan, held=again, solver=lambda groups: iter(()))  # nothing is merged again
        expected = execute(plan).adapter
        assert all(equal(result.adapter[name], expected[name]) for name in expected)
        assert again.reports == execute(plan).report.modules


def test_files_that_are_merged_leave_no_trace_of_it(tmp_path, monkeypatch):
    sources = [make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("AB")]
    merge_files(sources, tmp_path / "one")
    monkeypatch.setattr(Held.__init__, "__defaults__", (None, None, 0))
    merge_files(sources, tmp_path / "two" / "deep")
    file = "adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / "deep" / file).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"A", "B", "one", "two"}
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["deep"]
