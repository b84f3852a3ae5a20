"""What README and guide show is run: every command, every recipe, the Python."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tiny import make_adapter, make_base

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    text: str


def blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Block(m["mark"] or "", m["language"], m["text"]) for m in BLOCK.finditer(text)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the adapters math, code and chat, and a base model."""
    make_adapter(tmp_path / "math", 16, seed=1, dtype=torch.bfloat16, task_type="CAUSAL_LM")
    make_adapter(tmp_path / "code", 32, seed=2, dtype=torch.bfloat16, use_rslora=True)
    make_adapter(tmp_path / "chat", 8, seed=3, dtype=torch.bfloat16, parts=("q_proj",))
    make_base(tmp_path / "base-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, monkeypatch):
    from coremerge.cli._app import app

    words = shlex.split(line, comments=True)
    assert words[0] == "coremerge"
    monkeypatch.setattr("sys.argv", words)
    return CliRunner().invoke(app, words[1:], catch_exceptions=False, prog_name="coremerge")


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_everything_that_is_shown_runs(name, folder, monkeypatch):
    names: dict[str, object] = {}
    ran = 0
    for block in blocks(name):
        if block.mark.startswith("not run"):
            continue
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, name, "exec"), names)
            ran += 1
        elif block.language == "bash":
            for line in filter(None, block.text.splitlines()):
                result = run(line, monkeypatch)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                ran += 1
    assert ran >= 4


def test_what_a_merge_prints_has_the_lines_that_are_shown(folder, monkeypatch):
    (shown,) = (block.text for block in blocks("README.md") if not block.language)
    printed = run("coremerge merge math code chat -o merged", monkeypatch).stdout

    def fixed(text):
        """All but what is measured."""
        return [re.sub(r"\d.*", "", line) for line in text.splitlines()]

    assert fixed(shown) == fixed(printed)


def test_every_named_target_of_make_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "docs/guide.md", "CHANGELOG.md", ".ci/run"):
        named = set(re.findall(r"\bmake ([a-z-]+)\b(?=[ `,;\n])", (ROOT / name).read_text(encoding="utf-8")))
        assert {word for word in named if word not in targets} <= {"it"}, name


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md", "docs/maths.md"):
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_every_option_of_merge_is_explained_in_its_help():
    from coremerge.cli._app import app

    shown = CliRunner().invoke(app, ["merge", "--help"]).stdout
    for name in ("README.md", "docs/guide.md"):
        for option in re.findall(r"coremerge merge [^`\n]*?(--[a-z-]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert option in shown or option == "--help"


def test_the_card_of_the_example_in_the_readme_is_valid(folder, monkeypatch):
    run("coremerge merge math code chat -o merged -q", monkeypatch)
    config = json.loads(Path("merged/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
