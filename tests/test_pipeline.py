"""merge_files: from files to a file, in one call."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from coremerge import Recipe, load
from coremerge.errors import InputError, OutputError
from coremerge.pipeline import merge_files, prepare
from tiny import make_adapter


@pytest.fixture
def sources(tmp_path):
    return [make_adapter(tmp_path / name, rank, seed=rank) for name, rank in (("A", 4), ("B", 6))]


def test_merges_and_tells_what_it_did(sources, tmp_path):
    told = []
    recipe = Recipe(method="sum", scale=1.0)
    merged = merge_files(sources, tmp_path / "OUT", recipe, threads=1, progress=lambda *part: told.append(part))
    for name, update in load(tmp_path / "OUT").items():
        expected = load(sources[0])[name].dense() + load(sources[1])[name].dense()
        torch.testing.assert_close(update.dense(), expected, rtol=1e-4, atol=1e-4)
    assert [part for part in told if part[0] == "reading"] == [("reading", 0, 2), ("reading", 1, 2)]
    assert told[-1] == ("writing", 4, 4) and ("merging", 4, 4) in told
    assert merged.report.rank == merged.saved.rank == 10
    assert merged.sha256.keys() == {"A", "B"}
    assert merged.to_dict()["output"]["path"] == str(tmp_path / "OUT")
    assert "Made with" not in (tmp_path / "OUT" / "README.md").read_text()


def test_the_bytes_do_not_depend_on_threads(sources, tmp_path):
    for threads in (1, 2):
        merge_files(sources, tmp_path / str(threads), threads=threads)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "12"]
    assert files[0] == files[1]


def test_preparing_touches_nothing(sources, tmp_path):
    before = sorted(tmp_path.iterdir())
    prepared = prepare(sources, out=tmp_path / "OUT")
    assert prepared.plan.rank == 10
    assert prepared.output_bytes == prepared.plan.output_bytes
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_is_checked_first(sources):
    with pytest.raises(OutputError, match="exists"):
        merge_files(["nowhere"], sources[0])


def test_nothing_to_merge(tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        merge_files([], tmp_path / "OUT")


def test_into_a_base_with_whole_tensors_and_biases(tmp_path):
    from tiny import make_base

    name = "model.layers.0.self_attn.q_proj"
    base = make_base(tmp_path / "base")
    extra = {f"{name}.lora_B.bias": torch.ones(24)}
    source = make_adapter(tmp_path / "A", extra=extra, lora_bias=True)
    with pytest.raises(InputError, match="bias"):  # the base has no bias there to add it to
        merge_files([source], tmp_path / "OUT", into=base)


def test_whole_tensors_go_into_the_base(tmp_path):
    from safetensors.torch import save_file

    from tiny import make_base

    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(2, 24)}, base / "model.safetensors", metadata={"format": "pt"})
    source = make_adapter(tmp_path / "A", extra={"score.weight": torch.ones(2, 24)}, modules_to_save=["score"])
    merge_files([source], tmp_path / "OUT", into=base)
    assert (load_file(tmp_path / "OUT" / "model.safetensors")["score.weight"] == 1).all()
