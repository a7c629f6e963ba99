"""How a run ends that does not reach its end: killed, interrupted, diverged, out of room."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.checkpoint.manifest import find_damage, newest_complete
from launch.runtime.run_dir import RunDir, read_metrics
from tests.cli.commands import (
    GONE_WITHIN_SECONDS,
    Ended,
    of_session,
    ranks_of,
    send,
    started,
    train,
    train_command,
    train_forked,
    wait_for,
    write_recipe,
)
from tests.resume.runs import steps_logged

LONG = "train.steps=100000"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that is in order."""
    return write_recipe(tmp_path)


def test_a_rank_killed_by_kill_9_and_the_run_resumed(recipe: Path, tmp_path: Path) -> None:
    whole = train_forked(recipe, "train.steps=8", f"run.dir={tmp_path}/whole", ranks=2)
    assert whole.code == 0, whole.output
    run = tmp_path / "run"
    # The ranks wait at a step, to be found there and killed.
    env = {"PYTHONPATH": str(_stop_at(tmp_path, step=6))}
    with started(train_command(recipe, "train.steps=8", ranks=2), env) as process:
        _wait_until(lambda: len(steps_logged(run)) == 5)
        send(ranks_of(process.pid)[1], signal.SIGKILL)
        output, _ = process.communicate()
    line = Ended(process.returncode, output).error()
    assert "another rank" in line
    assert "--resume auto" in line
    assert [r["step"] for r in steps_logged(run)] == [1, 2, 3, 4, 5]

    resumed = train_forked(recipe, "train.steps=8", resume="auto", ranks=2)
    assert resumed.code == 0, resumed.output
    assert f"resuming after step 4 from {run}" in resumed.output
    assert steps_logged(run) == steps_logged(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _stop_at(folder: Path, step: int) -> Path:
    # Read by Python at its start, in every process: the ranks are the real ones but for this.
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, importlib.abc, importlib.machinery\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'launch.training.train_step':\n"
        "            return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import importlib.util\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        load = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            load(module)\n"
        "            step, count = module.train_step, iter(range(1, 10**9))\n"
        "            def slow(*arguments):\n"
        f"                if next(count) == {step}:\n"
        "                    import os, time\n"
        "                    time.sleep(3600 if os.environ['RANK'] == '1' else 0)\n"
        "                return step(*arguments)\n"
        "            module.train_step = slow\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return site


def _launcher(session: int) -> psutil.Process:
    return next(p for p in of_session(session) if "deepspeed.launcher.launch" in p.cmdline())


def _front_end(session: int) -> psutil.Process:
    return psutil.Process(session)


@pytest.mark.parametrize("victim", [_launcher, pytest.param(_front_end, marks=pytest.mark.matrix)])
def test_nothing_outlives_the_launcher(
    victim: Callable[[int], psutil.Process], recipe: Path, tmp_path: Path
) -> None:
    with started(train_command(recipe, LONG, ranks=2)) as process:
        wait_for(process, "step 1/")
        send(victim(process.pid), signal.SIGKILL)
        # Returns when the last holder of the pipe is gone.
        process.communicate(timeout=GONE_WITHIN_SECONDS)
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) >= 1


@pytest.mark.matrix
def test_a_rank_that_hangs_ends_the_run_at_the_time_limit(recipe: Path, tmp_path: Path) -> None:
    env = {"DEEPSPEED_TIMEOUT": "1"}  # minutes
    with started(train_command(recipe, LONG, ranks=2), env) as process:
        wait_for(process, "step 1/")
        send(ranks_of(process.pid)[1], signal.SIGSTOP)
        output, _ = process.communicate(timeout=GONE_WITHIN_SECONDS)
    assert process.returncode != 0
    assert "another rank" in Ended(process.returncode, output).error()
    assert newest_complete(RunDir(tmp_path / "run"))[1] == []


def test_ctrl_c_is_one_line(recipe: Path, tmp_path: Path) -> None:
    with started([*train_command(recipe, LONG)]) as process:
        read = wait_for(process, "step 1/")
        _wait_until(lambda: list((tmp_path / "run/checkpoints").glob("step_*")))
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in Ended(process.returncode, read + output).error()
    newest, _ = newest_complete(RunDir(tmp_path / "run"))
    assert newest is not None


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.matrix)]
)
def test_a_signal_saves_and_has_an_exit_code_of_its_own(
    number: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = train_command(recipe, LONG, "checkpoint.every=1000000", ranks=2)
    with started(command) as process:
        wait_for(process, "step 1/")
        send(ranks_of(process.pid)[1], number)  # one rank gets it, and all save after the same step
        output, _ = process.communicate(timeout=GONE_WITHIN_SECONDS)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    newest, _ = newest_complete(RunDir(run))
    last = steps_logged(run)[-1]["step"]
    assert newest is not None
    assert newest.name == f"step_{last:08d}"
    assert f"stopped on request after step {last} of 100000" in output


def test_a_loss_that_is_no_number_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    ended = train_forked(
        recipe, "train.steps=30", "deepspeed.optimizer.params.lr=1e30",
        "train.schedule.warmup_steps=0", "checkpoint.every=1",
    )  # fmt: skip
    line = ended.error()
    assert ended.code == 2
    assert "step " in line
    assert "deepspeed.optimizer.params.lr" in line
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert f"step {last + 1}: loss is nan" in line
    assert find_damage(tmp_path / f"run/checkpoints/step_{last:08d}") is None


FILES = {
    "checkpoint": (100_000, (), ("checkpoint of step 2", "make room", "--resume auto")),
    # Training goes on for two steps before the next save tells of it.
    "checkpoint in the background": (
        100_000,
        ("checkpoint.asynchronous=true",),
        ("checkpoint of step 2", "make room", "--resume auto"),
    ),
    "metrics": (6_000, ("checkpoint.every=0", "train.steps=60"), ("metrics.jsonl", "cannot write")),
    "weights": (100_000, ("checkpoint.every=0",), ("model.safetensors", "cannot write")),
    "any other": (500, (), ("File too large", "file size limit")),
}


def test_a_file_that_cannot_grow_is_told_in_one_line(recipe: Path, tmp_path: Path) -> None:
    first = train_forked(recipe, f"run.dir={tmp_path}/first")  # makes the tokens, which grow too
    assert first.code == 0, first.output
    for name, (size, sets, words) in FILES.items():
        folder = tmp_path / name
        ended = train_forked(recipe, f"run.dir={folder}", *sets, file_limit=size)
        line = ended.error()
        assert ended.code == 2
        assert all(word in line for word in words), line
        steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
        assert steps == list(range(1, len(steps) + 1)) or name == "weights"
        assert not list(folder.glob("checkpoints/.saving_*"))
        assert not (folder / "model.safetensors").exists()


def test_an_unexpected_error_keeps_its_traceback(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import launch.config.layout\n"
        "def broken(*_): raise ValueError('a defect of ours')\n"
        "launch.config.layout.plan_layout = broken\n"
    )
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    ended = train(recipe, env={"PYTHONPATH": paths})
    assert ended.code == 1
    assert ended.output.count("Traceback") == 1
    assert "a defect of ours" in ended.output
