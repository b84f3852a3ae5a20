"""coremerge report, and merge --report."""

from __future__ import annotations

from pathlib import Path


def test_merge_draws_its_report(run):
    result = run("merge", "A", "B", "-o", "OUT", "--report", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert "<h2>Spectra</h2>" in Path("OUT/report.html").read_text()


def test_report_is_drawn_afterwards_and_again(run):
    run("merge", "A", "B", "-o", "OUT", "-q")
    for _ in range(2):
        result = run("report", "OUT")
        assert (result.exit_code, result.stdout) == (0, "written to OUT/report.html\n")


def test_somebody_elses_report_is_not_replaced(run):
    run("merge", "A", "B", "-o", "OUT", "-q")
    for content in (b"<html>my notes</html>", b"", b"\xff\xfe"):
        Path("OUT/report.html").write_bytes(content)
        refused = run("report", "OUT")
        assert (refused.exit_code, "report.html: exists" in refused.stderr) == (1, True)
        assert Path("OUT/report.html").read_bytes() == content
    assert run("report", "OUT", "--overwrite", "-q").exit_code == 0
    assert run("report", "OUT", "-q").exit_code == 0


def test_report_goes_where_it_is_asked_for_once(run):
    run("merge", "A", "B", "-o", "OUT", "-q")
    assert run("report", "OUT", "-o", "new/r.html", "-q").exit_code == 0
    again = run("report", "OUT", "-o", "new/r.html")
    assert (again.exit_code, "--overwrite" in again.stderr) == (1, True)
    assert run("report", "OUT", "-o", "new/r.html", "--overwrite", "-q").exit_code == 0


def test_a_folder_without_a_merge_is_refused(run):
    result = run("report", "A")
    assert result.exit_code == 1
    assert "Give a folder that coremerge merge wrote" in result.stderr
