"""`scripts/parity.py` as a person runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.parity.bisect import report
from launch.paths import ROOT
from scripts import parity as command
from tests.cli.commands import run_forked
from tests.parity.cases import write_text
from tests.ranks import forked_local_ranks

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


def check_that_parity_holds(printed: str, folder: Path) -> None:
    assert "parity holds" in printed
    assert "bisect" not in printed
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert sum("grad norm" in row and "step" in row for row in rows) >= 2
    assert "the worst" in rows[-1]
    assert (folder / "out" / "parity.png").stat().st_size > 10_000


def test_two_ranks_agree_with_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.parity.run_local_ranks", forked_local_ranks)
    given = [*arguments(tmp_path), "--ranks", "2", "--bisect", "--uneven-loss-weights"]
    assert command.main(given) == 0
    check_that_parity_holds(capsys.readouterr().out, tmp_path)


@pytest.mark.matrix  # how it starts its ranks: tests/unit/test_local_launcher.py
@pytest.mark.parametrize("weights", [(), ("--uneven-loss-weights",)])
def test_two_ranks_started_anew_agree_with_one_device(
    tmp_path: Path, weights: tuple[str, ...]
) -> None:
    done = run(*arguments(tmp_path), "--ranks", "2", "--bisect", *weights)
    assert done.returncode == 0, done.stderr
    check_that_parity_holds(done.stdout, tmp_path)


def faulty_write_layout_record(values: dict[str, object], file: Path, uneven: bool) -> None:
    """Run in each rank by `test_a_fault_ends_with_exit_code_1_and_its_place`."""
    from launch.parity.run import write_layout_record
    from tests.parity.faults.model import causal_mask_shifted

    causal_mask_shifted()
    write_layout_record(values, file, uneven)


def faulty_write_recording(
    values: dict[str, object], folder: Path, uneven: bool, steps: int
) -> None:
    """The same with a recording."""
    from launch.parity.run import write_recording
    from tests.parity.faults.model import causal_mask_shifted

    assert steps == 1, "the first step with a difference is the last one to record"
    causal_mask_shifted()
    write_recording(values, folder, uneven, steps)


def test_a_fault_ends_with_exit_code_1_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.parity.run.write_layout_record", faulty_write_layout_record)
    monkeypatch.setattr("launch.parity.run.write_recording", faulty_write_recording)
    for module in ("scripts.parity", "launch.parity.bisect"):
        monkeypatch.setattr(f"{module}.run_local_ranks", forked_local_ranks)
    given = [*arguments(tmp_path), "--ranks", "1", "--bisect"]
    assert command.main(given) == command.EXIT_DIFFERENT
    printed = capsys.readouterr().out
    assert "parity FAILS" in printed
    assert "loss at step 1" in printed
    first, meaning, *then = printed[printed.index("bisect: ") :].splitlines()
    assert first.startswith(
        "bisect: step 1, forward, rank 0: blocks.0.attention.out (its input) differs by "
    )
    assert "look at what blocks.0.attention does" in meaning
    assert len(then) == 7
    assert then[0].startswith(
        "then    step 1, forward, rank 0: blocks.0.attention.out (its output)"
    )


def test_a_difference_that_only_a_compiled_model_has() -> None:
    assert "needs train.compile=true" in report([], compiled=True)
    assert "within their bounds" in report([], compiled=False)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_forked(["scripts/parity.py", *arguments(tmp_path), "--ranks", "3"])
    assert done.code == 2
    assert "train.global_batch_size" in done.error()


def test_more_steps_than_the_tolerances_hold_for_are_rejected(tmp_path: Path) -> None:
    done = run_forked(["scripts/parity.py", *arguments(tmp_path), "--steps", "11"])
    assert done.code == 2
    assert "--steps" in done.error()
