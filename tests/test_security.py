"""No way to run code from a file, looked for in the source itself: see SECURITY.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import coremerge

SOURCES = sorted(Path(coremerge.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess", "pickle.load", "pickle.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "runpy.run_path", "joblib.load", "numpy.load",
    "np.load", "shelve.open",
}  # fmt: skip
LOADERS = ("from_pretrained", "load_dataset")


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(node: ast.Call, key: str) -> str | None:
    return next((ast.unparse(word.value) for word in node.keywords if word.arg == key), None)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_code_never_comes_from_a_file(file: Path) -> None:
    for name, node in calls(file):
        assert name not in FORBIDDEN and not name.startswith("subprocess."), f"{file}:{node.lineno}"
        assert given(node, "trust_remote_code") in (None, "False"), f"{file}:{node.lineno}"
        if name == "torch.load":
            assert given(node, "weights_only") == "True", f"{file}:{node.lineno}"


def test_models_and_data_sets_are_loaded_without_remote_code() -> None:
    """Every place says so itself, whatever the library's default is."""
    found = [(file, node) for file in SOURCES for name, node in calls(file) if name.endswith(LOADERS)]
    assert found
    for file, node in found:
        assert given(node, "trust_remote_code") == "False", f"{file}:{node.lineno}"
