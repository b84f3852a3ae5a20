"""A batch whose jobs are done by other processes: here they are sent, and done in this one, each twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from coremerge import __version__
from coremerge.batch import BatchReport, Job, Row, jobs_of, run_batch
from coremerge.batch_remote import Attempt, Home, _places, do
from coremerge.errors import OutputError
from posted import Posted
from tiny import make_adapter, make_base

RECIPES = {"default": {}, "ties": {"merge_method": "ties", "parameters": {"density": 0.2}}}
SETS = {
    "part": ["A", "C"],
    "model": {"models": ["A", "B"], "into": "base"},
    "gone": ["A", "nowhere"],
}
MADE = [f"{one}/{recipe}" for one in ("part", "model") for recipe in RECIPES]
ALL = [*MADE, "gone/default", "gone/ties"]


class StoppedError(BaseException):
    """As Ctrl-C is, no error."""


class Far(Posted):
    """Posted, to processes that stand in another folder."""

    def run(self, function: Any, *rest: Any, **options: Any) -> Any:
        return super().run(partial(_elsewhere, function), *rest, **options)


def _elsewhere(function: Callable[[Any], Any], item: Any) -> Any:
    before = Path.cwd()
    os.chdir("/")
    try:
        return function(item)
    finally:
        assert Path.cwd() == Path("/")
        os.chdir(before)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Named from a folder above it."""
    folder = tmp_path / "in"
    for seed, name in enumerate("ABC"):
        make_adapter(folder / name, 3 + seed, seed=seed, layers=1 if name == "C" else 2)
    make_base(folder / "base")
    (folder / "m.yaml").write_text(yaml.safe_dump({"recipes": RECIPES, "sets": SETS}, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return Path("in/m.yaml")


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def plain(report: BatchReport) -> list[Row]:
    return [replace(row, seconds=0.0) for row in report.rows]


def statuses(report: BatchReport) -> list[str]:
    return [row.status for row in report.rows]


def test_rows_and_bytes_are_those_of_one_process(manifest: Path, tmp_path: Path) -> None:
    here = run_batch(manifest, "here", threads=1)
    told: list[tuple[str, int, int]] = []
    there = run_batch(manifest, "there", executor=Far(), progress=lambda *part: told.append(part))
    assert plain(there) == plain(here)
    assert statuses(there) == ["done"] * 4 + ["failed"] * 2 and there.rows[0].notes
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert told == [(name, done, 6) for done, name in enumerate(ALL, 1)]
    left = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").glob("*/*")}
    assert left == set(MADE) and names("there") == ["model", "part"]


def test_what_is_there_is_skipped_whoever_made_it(manifest: Path, tmp_path: Path) -> None:
    run_batch(manifest, "OUT", only=["part/*", "model/ties"])
    before = times(tmp_path / "OUT")
    report = run_batch(manifest, "OUT", only=["part/*", "model/*"], executor=Far())
    assert statuses(report) == ["skipped", "skipped", "done", "skipped"]
    assert before.items() <= times(tmp_path / "OUT").items()
    assert statuses(run_batch(manifest, "OUT", only=["part/*", "model/*"])) == ["skipped"] * 4


def test_a_result_that_is_made_anew_is_done(manifest: Path) -> None:
    run_batch(manifest, "OUT", only=["part/*"])
    make_adapter(Path("in/C"), 4, seed=9, layers=1)
    report = run_batch(manifest, "OUT", only=["part/*"], executor=Posted())
    assert statuses(report) == ["failed", "failed"] and "C has changed" in str(report.rows[0].error)
    assert statuses(run_batch(manifest, "OUT", only=["part/*"], executor=Posted(), overwrite=True)) == ["done", "done"]


def test_a_job_that_kills_its_processes_does_not_stop_the_others(manifest: Path) -> None:
    report = run_batch(manifest, "OUT", executor=Posted(lambda job: job.name == "part/ties"))
    assert statuses(report) == ["done", "failed", "done", "done", "failed", "failed"]
    assert report.rows[1].error == "lost"
    assert statuses(run_batch(manifest, "OUT", executor=Posted()))[:4] == ["skipped", "done", "skipped", "skipped"]


def test_stopped_in_the_middle_it_leaves_whole_results_and_goes_on(manifest: Path) -> None:
    def stop(label: str, done: int, count: int) -> None:
        if done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_batch(manifest, "OUT", executor=Posted(), progress=stop)
    assert names("OUT") == ["part"] and names("OUT/part") == ["default", "ties"]
    assert statuses(run_batch(manifest, "OUT", executor=Posted()))[:4] == ["skipped", "skipped", "done", "done"]


def test_a_dry_run_looks_from_here(manifest: Path) -> None:
    posted = Posted()
    report = run_batch(manifest, "OUT", dry_run=True, executor=posted)
    assert statuses(report)[:4] == ["planned"] * 4 and not posted.sent and not Path("OUT").exists()


@pytest.mark.parametrize(("asked", "given"), [(None, 1), (3, 3)])
def test_a_task_has_one_processor_unless_it_is_asked_for_more(manifest: Path, asked: int | None, given: int) -> None:
    seen: list[Job] = []
    run_batch(manifest, "OUT", threads=asked, executor=Posted(lambda job: not seen.append(job)))
    assert {job.threads for job in seen} == {given} and len(seen) == 6


def test_results_that_cannot_be_are_said_before_any_work(manifest: Path) -> None:
    Path("OUT").write_text("a file")
    posted = Posted()
    with pytest.raises(OutputError, match="OUT"):
        run_batch(manifest, "OUT", executor=posted)
    assert not posted.sent


class TestWorker:
    """What a worker looks at before it begins."""

    @pytest.fixture
    def job(self, manifest: Path) -> Job:
        return jobs_of(manifest, Path.cwd() / "OUT", only=["model/ties"], threads=1)[0]

    @pytest.fixture
    def home(self, job: Job) -> Iterator[Home]:
        made = Home(str(Path.cwd()), str(Path.cwd() / "OUT"), "abcd")
        made.mark.mkdir(parents=True)
        yield made

    def test_who_sees_all_of_it_works(self, home: Home, job: Job) -> None:
        assert do(home, (job, _places(job))).status == "done"

    def failed(self, home: Home, job: Job, places: dict[str, str]) -> str:
        row = do(home, (job, places))
        assert row.status == "failed" and not Path(job.out).parent.exists()
        return str(row.error)

    def test_a_disk_of_its_own_is_said_though_its_folders_are_called_alike(self, home: Home, job: Job) -> None:
        home.mark.rmdir()
        error = self.failed(home, job, _places(job))
        assert error.startswith(f"{home.out}: cannot be seen on ") and "a disk that all machines share" in error

    def test_inputs_that_are_not_there_are_not_looked_for_on_the_hub(self, home: Home, job: Job) -> None:
        places = _places(job)
        assert places["in/base"] == str(Path.cwd() / "in/base")
        shutil.rmtree("in/base")
        assert self.failed(home, job, places).startswith(f"{places['in/base']}: cannot be seen on ")

    def test_relative_paths_that_lead_elsewhere(self, home: Home, job: Job, tmp_path: Path) -> None:
        shutil.copytree("in", tmp_path / "other/in")
        error = self.failed(replace(home, folder=str(tmp_path / "other")), job, _places(job))
        assert error.startswith(f"{tmp_path / 'in/A'}: cannot be seen on ")

    def test_another_version(self, home: Home, job: Job) -> None:
        error = self.failed(replace(home, version="0.0.1"), job, _places(job))
        assert f"has coremerge {__version__}" in error

    def test_paths_in_full_need_no_folder(self, home: Home, job: Job) -> None:
        here = Path.cwd()
        full = replace(job, sources=tuple(str(here / one) for one in job.sources), into=str(here / str(job.into)))
        assert do(replace(home, folder="/nowhere"), (full, _places(full))).status == "done"


class TestAttempt:
    def test_who_does_it_again_removes_what_the_dead_left_and_nothing_else(self, tmp_path: Path) -> None:
        dead, others = Attempt(str(tmp_path / "OUT"), "mine"), Attempt(str(tmp_path / "OUT"), "theirs")
        for one in (dead, others):
            one.place.mkdir()
            (one.place / "model.safetensors").write_text("half")
        with Attempt(str(tmp_path / "OUT"), "mine") as again:
            assert again.place == dead.place and not again.place.exists()
            again.place.mkdir()
        assert list(tmp_path.iterdir()) == [others.place]

    def test_a_result_that_is_in_its_place_stays(self, tmp_path: Path) -> None:
        with Attempt(str(tmp_path / "OUT"), "mine") as attempt:
            attempt.place.mkdir()
            attempt.place.rename(tmp_path / "OUT")
        assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
