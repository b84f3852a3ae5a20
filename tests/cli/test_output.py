"""Numbers and tables for people."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
import rich.markup

from coremerge.cli._output import (
    duration,
    facts,
    number,
    print_json,
    progress_bar,
    remark,
    say,
    table,
    unmarked,
)
from coremerge.text import size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_700, "1 MB"), (2.5e12, "2.5e+03 GB")]
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.00 s"), (9.99, "9.99 s"), (10.04, "10.0 s"), (59.7, "1 min 0 s"), (3600, "60 min 0 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers():
    assert [number(x) for x in (0.5, 2, 1 / 3, -1e-9)] == ["0.5", "2", "0.3333", "-1e-09"]


def test_a_table_without_rows_has_its_headings():
    assert table(["a", "bb"], []) == "a  bb\n-  --"


NASTY = "\x1b[31m\u202e[/][bold]hf_" + "a" * 34


def test_nothing_on_stdout_commands_the_terminal(capsys):
    say(table([NASTY, "n"], [[NASTY, 1]]) + "\n" + facts([(NASTY, NASTY)]) + "\n" + NASTY)
    print_json({NASTY: [NASTY]})
    remark("note", NASTY)
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert len(lines) == 11 and all(line.isprintable() and "hf_" not in line for line in lines)
    assert lines[2].startswith(r"\x1b[31m\u202e[/][bold]***")


def test_json_keeps_its_meaning(capsys):
    print_json({"é\x9b": "\ud83d"})
    said = capsys.readouterr().out
    assert "é" in said and json.loads(said) == {"é\x9b": "\ud83d"}


def test_a_label_is_only_text_to_the_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress_bar() as tell:
        tell("of [/] and [link=http://x]\x1b[2J", 1, 2)
    assert "\x1b[2J" not in sys.stderr.getvalue()
    assert rich.markup.render(unmarked("a[/]b[red]\x1b")).plain == r"a[/]b[red]\x1b"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_package_logs_is_a_warning_unless_quiet(quiet, capsys):
    with progress_bar(quiet):
        logging.getLogger("coremerge.learning.files").warning("base %s", "\x1b[31mis odd")
    assert not logging.getLogger("coremerge").handlers
    assert capsys.readouterr().err == ("" if quiet else "warning: base \\x1b[31mis odd\n")


def test_stages_are_lines_where_stderr_is_no_terminal(capsys):
    for quiet in (True, False):
        with progress_bar(quiet, stages=True) as tell:
            for call in (("own adapter", 0, 2), ("no adapter", 1, 2), ("done", 2, 2)):
                tell(*call)
    assert capsys.readouterr().err.splitlines() == ["1 of 2: own adapter", "2 of 2: no adapter"]
