"""kill -9 at random moments, of a rank, of the launcher or of all: the run ends bit for bit the same."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.checkpoint.manifest import newest_complete
from launch.runtime.run_dir import RunDir
from tests.cli.commands import (
    of_session,
    ranks_of,
    send,
    started,
    train_command,
    train_forked,
    wait_for,
    write_recipe,
)
from tests.resume.runs import steps_logged

STEPS, KILLS = 60, 12
SETS = (f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=1")


def _rank(session: int) -> list[psutil.Process]:
    return [random.choice(list(ranks_of(session).values()))]


def _launcher(session: int) -> list[psutil.Process]:
    return [p for p in of_session(session) if "deepspeed.launcher.launch" in p.cmdline()]


def _front_end(session: int) -> list[psutil.Process]:
    return [psutil.Process(session)]


VICTIMS: tuple[Callable[[int], list[psutil.Process]], ...] = (
    _rank,
    _launcher,
    _front_end,
    of_session,
)


@pytest.mark.matrix
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_again_and_again(asynchronous: bool, tmp_path: Path) -> None:
    recipe, seed = write_recipe(tmp_path), time.time_ns()
    print("seed", seed)  # shown where the test fails
    random.seed(seed)
    sets = (*SETS, f"checkpoint.asynchronous={asynchronous}")
    whole = train_forked(recipe, *sets, f"run.dir={tmp_path}/whole", ranks=2)
    assert whole.code == 0, whole.output
    run, done, kills = RunDir(tmp_path / "run"), 0, 0
    while kills < KILLS:
        with started(train_command(recipe, *sets, ranks=2, resume="auto")) as process:
            if wait_for_step(process) is None:
                break  # it has reached its end
            time.sleep(random.uniform(0, 0.5))
            for victim in VICTIMS[kills % len(VICTIMS)](process.pid):
                send(victim, signal.SIGKILL)
            process.communicate()
        kills += 1
        newest, damaged = newest_complete(run)
        assert damaged == []
        step = 0 if newest is None else int(newest.name.removeprefix("step_"))
        # No more is lost than the steps since the last complete save, of which one may be under way.
        assert step >= max(done, len(steps_logged(run.path)) - 2 - asynchronous)
        done = step
    resumed = train_forked(recipe, *sets, ranks=2, resume="auto")
    assert resumed.code == 0, resumed.output
    assert kills >= 4
    assert steps_logged(run.path) == steps_logged(tmp_path / "whole")
    for name in (
        "model.safetensors",
        f"checkpoints/step_{STEPS:08d}/state_rank0001_000.safetensors",
    ):
        assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def wait_for_step(process: "subprocess.Popen[str]") -> str | None:
    """What a command has printed up to its first step; None if it takes none."""
    try:
        return wait_for(process, "checkpoint of step")
    except AssertionError:
        return None
