"""`scripts/parity.py` as a person runs it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.local_launcher import run_local_ranks
from scripts import parity as command
from tests.parity.cases import write_text

RECIPE = ROOT / "recipes" / "gpt_tiny_zero1.yaml"


def arguments(folder: Path) -> list[str]:
    small = ["model.layers=1", "model.hidden=32", "data.sequence_length=16"]
    batch = ["train.global_batch_size=4", "train.micro_batch_size=1"]
    data = [f"data.source={write_text(folder)}", f"data.cache_dir={folder / 'cache'}"]
    fixed = ["--config", str(RECIPE), "--steps", "2", "--out", str(folder / "out")]
    return [*fixed, "--set", *small, *batch, *data]


def run(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/parity.py", *given],
        cwd=ROOT, capture_output=True, text=True, timeout=1000, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "weights", [pytest.param((), marks=pytest.mark.matrix), ("--uneven-loss-weights",)]
)
def test_two_ranks_agree_with_one_device(tmp_path: Path, weights: tuple[str, ...]) -> None:
    done = run(*arguments(tmp_path), "--ranks", "2", *weights)
    assert done.returncode == 0, done.stderr
    assert "parity holds" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert sum("grad norm" in row and "step" in row for row in rows) >= 2
    assert "the worst" in rows[-1]
    assert (tmp_path / "out" / "parity.png").stat().st_size > 10_000


def faulty_write_layout_record(values: dict[str, object], file: Path, uneven: bool) -> None:
    """Run in each rank by `test_a_fault_ends_with_exit_code_1`."""
    from launch.parity.run import write_layout_record
    from tests.parity.faults.zero import gradients_not_divided_by_the_accumulation_steps

    gradients_not_divided_by_the_accumulation_steps()
    write_layout_record(values, file, uneven)


def test_a_fault_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.parity.run.write_layout_record", faulty_write_layout_record)
    assert command.main([*arguments(tmp_path), "--ranks", "1"]) == command.EXIT_DIFFERENT
    assert "parity FAILS" in (printed := capsys.readouterr().out)
    assert "grad norm at step 1" in printed


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(*arguments(tmp_path), "--ranks", "3")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        done.stderr.splitlines()[-1]
    ]
    assert "train.global_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_steps_than_the_tolerances_hold_for_are_rejected(tmp_path: Path) -> None:
    done = run(*arguments(tmp_path), "--steps", "11")
    assert done.returncode == 2
    assert "--steps" in done.stderr


def one_rank_is_killed() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def one_rank_rejects() -> None:
    if os.environ["RANK"] == "1":
        raise UserError("data.source: there is no text")
    time.sleep(600)


def test_ranks_end_together() -> None:
    with pytest.raises(UserError, match="rank 1 died with exit code -9"):
        run_local_ranks(one_rank_is_killed, 2)
    with pytest.raises(UserError, match=r"^data\.source: there is no text$"):
        run_local_ranks(one_rank_rejects, 2)
    ours = psutil.Process().children(recursive=True)
    assert not [child for child in ours if "spawn_main" in " ".join(child.cmdline())]
