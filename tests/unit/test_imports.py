"""Imports run one way: scripts -> launch -> models. And what needs no framework imports none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from launch.recipe import ROOT

MAY_IMPORT = {
    "models": {"models"},
    "launch": {"launch", "models"},
    "scripts": {"launch", "models"},
    "tests": {"tests", "launch", "models", "scripts"},
}
FILES = sorted(file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> set[str]:
    """The top-level packages that a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[0]
    found = imported(file.read_text())
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[folder]
    if folder == "models":
        # The pipeline is DeepSpeed's; the layers and their cuts are anyone's.
        assert "deepspeed" not in found or file.stem in ("pipeline", "schedules")


def test_the_check_sees_every_kind_of_import() -> None:
    hidden = "def f():\n    import scripts.plan as p\n    from tests.ranks import run_ranks\n"
    assert imported(hidden) == {"scripts", "tests"}
    with pytest.raises(AssertionError, match="relative"):
        imported("from . import engine")


@pytest.mark.parametrize("module", ["models.config", "launch.recipe", "launch.layout"])
def test_planning_needs_no_framework(module: str) -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["launch", "scripts"])
def test_no_file_hides_a_library(folder: str) -> None:
    """`python launch/train.py` puts launch/ on the path, where datasets.py would hide the library."""
    used = set().union(*(imported(file.read_text()) for file in FILES)) | set(
        sys.stdlib_module_names
    )
    names = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not names & (used - MAY_IMPORT.keys())
