"""scripts/reshape.py: a copy that another layout resumes, and what it rejects."""

import json
import shutil
from pathlib import Path

import pytest

from launch.errors import UserError
from launch.paths import ROOT
from scripts import reshape as command
from tests.cli.commands import Ended, run_forked, train_forked, write_recipe
from tests.resume.layouts import same, whole_state
from tests.resume.runs import steps_logged

SCRIPT = ROOT / "scripts/reshape.py"
PIPELINE = ("parallel.pipeline=2", "parallel.tensor=2", "deepspeed.config=ds_configs/zero1.json")


def reshape(*arguments: str | Path) -> Ended:
    return run_forked([SCRIPT, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and a run of it on two ranks that has four steps left."""
    folder = tmp_path_factory.mktemp("trained")
    ended = train_forked(write_recipe(folder), "model.dropout=0", ranks=2)
    assert ended.code == 0, ended.output
    return folder


def test_a_copy_goes_on_in_another_layout(trained: Path, tmp_path: Path) -> None:
    recipe, out = trained / "small.yaml", tmp_path / "moved"
    sets = [
        part for key in ("model.dropout=0", "train.steps=8", *PIPELINE) for part in ("--set", key)
    ]
    ended = reshape(trained / "run", out, "--config", recipe, *sets, "--ranks", "4")
    assert ended.code == 0, ended.output
    assert (
        "small can resume it; pipeline 1 x data 2 x tensor 1 becomes pipeline 2 x" in ended.output
    )
    (before,) = (trained / "run/checkpoints").glob("step_00000004")
    copy = out / "checkpoints/step_00000004"
    assert same(whole_state(before), whole_state(copy))
    files = json.loads((copy / "manifest.json").read_text())["files"]
    assert [name for name in files if name.startswith("state")] == ["state_000.safetensors"]

    resumed = train_forked(
        recipe, "model.dropout=0", "train.steps=8", *PIPELINE, f"run.dir={out}", ranks=4, resume=out
    )
    assert resumed.code == 0, resumed.output
    assert "is of another layout, and is read into this one" in resumed.output
    assert [r["step"] for r in steps_logged(out) if "loss" in r] == [5, 6, 7, 8]


def test_bad_input_is_one_line(trained: Path, tmp_path: Path) -> None:
    recipe = trained / "small.yaml"
    line = reshape(trained / "run", trained / "run").error()
    assert "holds a run already; name a new folder" in line
    out = tmp_path / "out"
    assert "no complete checkpoint" in rejected(_run_without(tmp_path), out)
    other = rejected(trained / "run", out, "--config", recipe, "--set", "train.seed=7")
    assert "train.seed was 1234 and is 7" in other
    assert "no readable manifest.json" in rejected(tmp_path, out)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "run/checkpoints/step_00000004", damaged)
    (damaged / "state_rank0001_000.safetensors").unlink()
    assert "state_rank0001_000.safetensors is missing" in rejected(damaged, out)
    assert not out.exists()


def rejected(*arguments: str | Path) -> str:
    """What the command would print, without a process of its own."""
    with pytest.raises(UserError) as error:
        command.run(command.parse_arguments([str(argument) for argument in arguments]))
    return str(error.value)


def _run_without(folder: Path) -> Path:
    (folder / "empty/checkpoints").mkdir(parents=True)
    return folder / "empty"
