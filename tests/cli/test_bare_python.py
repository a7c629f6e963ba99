"""Scripts on a Python without the packages: one line says which is missing and where they are."""

import sys
from pathlib import Path

import pytest

from launch.errors import missing_package
from launch.paths import ROOT
from tests.cli.commands import Ended, run

PROGRAMS = [
    *(file for file in sorted((ROOT / "scripts").glob("*.py")) if file.stem != "__init__"),
    ROOT / "launch" / "train.py",
]


def bare(*words: str | Path) -> Ended:
    """Run by this interpreter without site-packages; -E keeps PYTHONPATH out."""
    return run([sys.executable, "-S", "-E", *words])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.stem)
def test_help_is_shown_or_the_missing_package_named(program: Path) -> None:
    done = bare(program, "--help")
    assert "Traceback" not in done.output
    if done.code == 0:
        assert done.output.startswith("usage: ")
    else:
        assert done.code in (1, 2)
        assert done.output.startswith(f"error: {sys.executable} has no ")
        assert done.output.endswith("; run: make setup, and use .venv/bin/python\n")
        assert done.output.count("\n") == 1


def test_what_is_missing_only_later_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").write_text("{}")
    (tmp_path / "1" / "model.safetensors").touch()
    for done in (
        bare(ROOT / "scripts/check_config.py", ROOT / "ds_configs/zero2.json"),
        bare(ROOT / "scripts/generate.py", tmp_path),
    ):
        assert done.code in (1, 2)
        assert done.output.startswith(f"error: {sys.executable} has no "), done.output
        assert done.output.count("\n") == 1


def test_a_module_of_ours_that_is_missing_is_a_defect() -> None:
    assert missing_package(ModuleNotFoundError(name="models")) is None
    assert missing_package(ModuleNotFoundError()) is None
    assert missing_package(ImportError(name="torch")) is None
    assert "has no yaml; " in str(missing_package(ModuleNotFoundError(name="yaml.reader")))
