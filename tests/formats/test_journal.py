"""What was finished is there again, whole, whatever happened to the file's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from coremerge.errors import ConfigError, OutputError, SourceError
from coremerge.formats import journal
from coremerge.formats.journal import RECORD, Journal


def write(path, count, mark="mark"):
    with Journal(path, mark) as journal:
        for i in range(len(journal.parts), count):
            journal.add({"part": i}, {"x": torch.full((i + 1,), float(i)), "empty": torch.zeros(0, 2)})


def parts(path, mark="mark"):
    with Journal(path, mark) as journal:
        for i, part in enumerate(journal.parts):
            tensors = journal.tensors(part)
            assert torch.equal(tensors["x"], torch.full((i + 1,), float(i)))
            assert tensors["empty"].shape == (0, 2)
        return [part.facts["part"] for part in journal.parts]


def test_parts_come_back_in_order(tmp_path):
    path = tmp_path / "a" / "b" / "journal"
    write(path, 3)
    assert parts(path) == [0, 1, 2]
    write(path, 5)
    assert parts(path) == [0, 1, 2, 3, 4]


def test_cut_anywhere_it_holds_what_was_whole_and_goes_on(tmp_path):
    path = tmp_path / "journal"
    ends = []
    for count in range(4):
        write(path, count)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert parts(path) == list(range(sum(end <= length for end in ends[1:])))
        assert path.stat().st_size == max([end for end in ends if end <= length], default=ends[0])
        if length % 7 == 0:
            write(path, 3)
            assert path.read_bytes() == whole


def test_a_flipped_bit_ends_it(tmp_path):
    path = tmp_path / "journal"
    write(path, 1)
    first = path.stat().st_size
    write(path, 3)
    whole = bytearray(path.read_bytes())
    for at in range(first, len(whole), 5):
        broken = bytearray(whole)
        broken[at] ^= 4
        path.write_bytes(broken)
        assert parts(path) in ([0], [0, 1])


def test_lengths_that_are_wrong_end_it(tmp_path):
    path = tmp_path / "journal"
    write(path, 1)
    first = path.stat().st_size
    write(path, 3)
    whole = path.read_bytes()
    for of_facts in range(RECORD.unpack_from(whole, first)[1]):
        length, _, check = RECORD.unpack_from(whole, first)
        broken = bytearray(whole)
        RECORD.pack_into(broken, first, length, of_facts, check)
        path.write_bytes(broken)
        assert parts(path) == [0]


def test_another_mark(tmp_path):
    write(tmp_path / "journal", 1)
    with pytest.raises(ConfigError, match="other adapters, inputs or settings"):
        parts(tmp_path / "journal", "other")
    assert parts(tmp_path / "journal") == [0]


@pytest.mark.parametrize(
    "content", [b"text", b"[1]\n", b"{}\n", b"{\n", json.dumps({"format": 1}).encode(), bytes(99), b"[" * 9999]
)
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="no journal"):
        parts(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError):
        write(tmp_path, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "journal", 1)


def test_two_processes_do_not_share_it(tmp_path):
    code = "import sys; from coremerge.formats.journal import Journal; Journal(sys.argv[1], 'mark'); print('open')"
    command = [sys.executable, "-c", code, str(tmp_path / "journal")]
    with Journal(tmp_path / "journal", "mark"):
        held = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert "another process is at work on it" in held.stderr
    assert "open" in subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ).stdout


def test_one_that_its_holder_removed_meanwhile_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    lock = journal._lock
    monkeypatch.setattr(journal, "_lock", lambda *given: (path.unlink(), lock(*given)))
    with pytest.raises(OutputError, match="another process is at work on it"):
        Journal(path, "mark")
