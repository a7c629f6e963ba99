"""The check that runs on every change is `make test`, and `make test` holds all of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.paths import ROOT


def dry_run(target: str, **variables: str) -> str:
    """What `make` would do, without doing it, from another folder."""
    given = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--dry-run", "--always-make", target, *given],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_ci_run_ends_in_make_test() -> None:
    lines = (ROOT / ".ci/run").read_text().split("\n")
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["exec make test", ""]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_workflow_runs_the_same_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == ".ci/run"


@pytest.mark.parametrize(
    "step",
    ["setup.sh test", "ruff format --check", "ruff check", "mypy", "build_ops.py", "pytest"],
)
def test_make_test_holds_each_step(step: str) -> None:
    assert step in dry_run("test")


def test_make_test_leaves_out_the_matrix_and_make_test_all_runs_it() -> None:
    assert 'pytest -m "not gpu and not matrix"' in dry_run("test")
    assert 'pytest -m "not gpu" ' in dry_run("test-all")


STUB = """#!/bin/sh
for word in "$@"; do
    [ "$word" != pytest ] || echo "ran pytest"
    [ "$word" != "$FAILING" ] || { echo "$word says why"; exit 3; }
done
"""


@pytest.mark.parametrize("step", ["nothing", "check", ".", "pytest", "scripts/build_ops.py"])
def test_make_test_fails_where_a_step_fails_and_tells_why(step: str, tmp_path: Path) -> None:
    """With stubs in the place of the programs; `check` fails of ruff, and `.` the first that gets it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").touch()
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["make", "test"], cwd=tmp_path, env={**os.environ, "FAILING": step},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (step == "nothing"), done.stdout + done.stderr
    assert ("ran pytest" in done.stdout) == (step not in ("check", "."))
    assert (f"{step} says why" in done.stdout) == (step != "nothing")


def test_the_whole_matrix_runs_at_night() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    assert workflow["jobs"]["test-all"]["steps"][-1]["run"] == "make test-all"
    assert "schedule" in workflow[True]  # YAML reads the key `on` as true


def test_make_train_sets_up_and_launches_the_recipe() -> None:
    commands = dry_run("train", RECIPE="recipes/x.yaml", RANKS="3", ARGS="--dry-run")
    assert "scripts/setup.sh" in commands
    assert (
        "deepspeed --log_level warning --num_gpus 3 launch/train.py --config recipes/x.yaml --dry-run"
        in commands
    )


def test_the_default_recipe_exists() -> None:
    words = dry_run("train").split()
    assert (ROOT / words[words.index("--config") + 1]).is_file()
