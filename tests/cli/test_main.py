"""The console script in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coremerge import __version__, cli, load
from tiny import make_adapter

HEAVY = ("torch", "numpy", "pydantic", "rich", "yaml", "safetensors", "huggingface_hub")


def python(code, *words, **settings):
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["methods", "-h"], ["--version"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom coremerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    process = python(code, *words)
    shown, heavy = process.communicate()
    assert heavy.strip() == ""
    assert shown.startswith("Usage: ") or shown == f"coremerge {__version__}\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_help_names_every_command(run, word):
    result = run(word)
    assert result.exit_code == 0
    for command in ("merge", "inspect", "methods", "demo"):
        assert f"\n  {command} " in result.stdout


def test_a_refusal_has_no_traceback(tmp_path):
    process = python("from coremerge.cli import main; main()", "merge", "A", "B", "-o", "OUT", cwd=tmp_path)
    shown, told = process.communicate()
    assert process.returncode == 1
    assert shown == ""
    assert told.startswith("Error: A: no such file or folder") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "status"), [(["--version"], 0), (["merge", "A", "-o", "B"], 1), (["merge", "-x"], 2)]
)
def test_the_script_ends_at_once_with_all_said(tmp_path, words, status):
    code = "import atexit\natexit.register(print, 'late')\nfrom coremerge.cli import script\nscript()"
    process = python(code, *words, cwd=tmp_path)
    shown, told = process.communicate()
    assert process.returncode == status
    assert shown + told and "late" not in shown


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_no_place_for_files(tmp_path, closed):
    for name in "AB":
        make_adapter(tmp_path / name)
    code = "from coremerge.cli import script\nscript()"
    process = python(code, "merge", "A", "B", "-o", "OUT", cwd=tmp_path, preexec_fn=lambda: os.close(closed))
    _, told = process.communicate()
    assert process.returncode == 0 and not told
    assert len(load(tmp_path / "OUT")) == 4


SLOW = """
import time
from coremerge.formats.safetensors_layout import TensorFile
quick = TensorFile.write
def write(*values):
    time.sleep(0.05)
    quick(*values)
TensorFile.write = write
print("ready", flush=True)
from coremerge.cli import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "status", "told"), [(signal.SIGINT, 130, "Error: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_in_the_middle_of_writing_leaves_nothing(tmp_path, sent, status, told):
    for name in "AB":
        make_adapter(tmp_path / name, layers=40)
    process = python(
        SLOW, "merge", "A", "B", "-o", "OUT", "--threads", "1", cwd=tmp_path, preexec_fn=restore_interrupts
    )
    wait_for(lambda: list(tmp_path.glob(".*.partial")), process)
    process.send_signal(sent)
    shown, message = process.communicate()
    assert (process.returncode, shown, message) == (status, "ready\n", told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B"]


def restore_interrupts():
    """A shell's background jobs ignore Ctrl-C, and so would this one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition, process):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    raise AssertionError("nothing was written")


class TestMain:
    @pytest.fixture(autouse=True)
    def keep_handlers(self):
        before = signal.getsignal(signal.SIGTERM)
        yield
        signal.signal(signal.SIGTERM, before)

    def call(self, monkeypatch, *words):
        monkeypatch.setattr("sys.argv", ["coremerge", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    def test_runs_the_command(self, monkeypatch, capsys):
        assert not self.call(monkeypatch, "methods", "ties")
        assert capsys.readouterr().out.startswith("method ties")

    def test_an_interrupt_is_one_line(self, monkeypatch, capsys):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr("coremerge.catalog.catalog", interrupted)
        assert self.call(monkeypatch, "methods") == 130
        assert capsys.readouterr().err == "Error: interrupted\n"
        monkeypatch.setattr("coremerge.cli._app.app", interrupted)
        assert self.call(monkeypatch) == 130

    def test_a_reader_that_has_gone_is_no_error(self, monkeypatch, capsys):
        def gone():
            raise BrokenPipeError(32, "Broken pipe")

        monkeypatch.setattr("coremerge.catalog.catalog", gone)
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))  # typer replaces them: put back afterwards
        assert self.call(monkeypatch, "methods") == 1
        assert capsys.readouterr().err == ""

    def test_ends_on_a_request_to_terminate(self, monkeypatch):
        self.call(monkeypatch, "--version")
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 143


def test_the_progress_bar_is_for_terminals(monkeypatch, capsys):
    from coremerge.cli._output import progress_bar

    with progress_bar() as progress:
        progress("merging", 1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar() as progress:
        progress("merging", 1, 2)
    assert capsys.readouterr().out == ""


def test_the_script_is_installed():
    assert Path(sys.executable).with_name("coremerge").exists() or sys.platform == "win32"
