"""The fork server that ranks are forks of: results, errors, hangs, and that nothing is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime import fork_server
from launch.runtime.fork_server import RankDiedError, RanksTimeoutError, run_ranks


def sum_of_ranks(extra: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor(dist.get_rank() + extra)
    dist.all_reduce(value)
    return dist.get_rank(), int(value)


def test_results_come_in_rank_order_from_one_process_group() -> None:
    assert run_ranks(sum_of_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def large_tensor() -> object:
    import torch

    return torch.full((1000, 300), float(os.environ["RANK"]))


def test_tensors_outlive_the_rank_that_made_them() -> None:
    import torch

    for rank, result in enumerate(run_ranks(large_tensor, 2)):
        assert isinstance(result, torch.Tensor)
        assert torch.equal(result, torch.full((1000, 300), float(rank)))


def environment() -> dict[str, str]:
    import torch

    assert torch.get_num_threads() == 1
    return dict(os.environ)


def test_each_rank_has_the_whole_launch_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BY_PARENT", "after the server began")
    first, second = run_ranks(environment, 2, env={"SET_BY_CALL": "x"})
    for rank, env in enumerate((first, second)):
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["SET_BY_CALL"] == "x"
        assert env["SET_BY_PARENT"] == "after the server began"
        assert env["OMP_NUM_THREADS"] == "1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert "SET_BY_CALL" not in os.environ


def leave_a_mark() -> tuple[int, object]:
    import deepspeed

    seen = getattr(deepspeed, "mark_of_a_test", None)
    deepspeed.mark_of_a_test = "set"
    return os.getpid(), seen


def test_a_run_starts_from_fresh_processes() -> None:
    (before, first_seen), (after, second_seen) = (run_ranks(leave_a_mark, 1)[0] for _ in range(2))
    assert first_seen is None
    assert second_seen is None
    assert before != after
    assert not runs(before)


def note_pid(folder: str) -> None:
    """Wait until both ranks have left their process id in `folder`."""
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)


def noted_pids_alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert len(pids) == 2
    return [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    """Whether a process still runs; one that only waits for its parent to read its end does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def still_running(pids: list[int]) -> list[int]:
    """Those of `pids` that do not end within some seconds."""
    deadline = time.monotonic() + 200.0
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if runs(pid)]


def fail_in_rank_one(folder: str) -> None:
    note_pid(folder)
    if os.environ["RANK"] == "1":
        raise UserError("train.steps: give some")
    time.sleep(600)


def test_an_exception_is_raised_again_and_ends_the_other_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.steps: give some") as caught:
        run_ranks(fail_in_rank_one, 2, str(tmp_path))
    note = "\n".join(caught.value.__notes__)
    assert "in rank 1" in note
    assert "fail_in_rank_one" in note
    assert not noted_pids_alive(tmp_path)


class StubbornError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("does not unpickle")
        self.where = (one, two)


def fail_stubbornly() -> None:
    raise StubbornError(1, 2)


def test_an_exception_that_does_not_pickle_is_told_as_text() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 failed(.|\n)*does not unpickle"):
        run_ranks(fail_stubbornly, 1)


def hang_in_rank_zero(folder: str) -> None:
    note_pid(folder)
    if os.environ["RANK"] == "0":
        print("rank 0 is about to sleep", flush=True)
        time.sleep(600)


def test_a_hung_rank_is_named_with_its_stack_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = fork_server._collect

    def once_they_hang(started: list[fork_server._Rank], timeout: float) -> None:
        """The seconds count from here: a slow machine is no hang."""
        while "about to sleep" not in started[0].printed() or not started[1].pipe.poll():
            time.sleep(0.01)
        collect(started, timeout)

    monkeypatch.setattr(fork_server, "_collect", once_they_hang)
    with pytest.raises(RanksTimeoutError) as caught:
        run_ranks(hang_in_rank_zero, 2, str(tmp_path), timeout=3.0)
    message = str(caught.value)
    assert "no answer after 3 s from rank 0\n" in message
    assert "in hang_in_rank_zero" in message
    assert "rank 0 is about to sleep" in message
    assert not noted_pids_alive(tmp_path)


def die_in_rank_one(folder: str) -> None:
    note_pid(folder)
    if os.environ["RANK"] == "1":
        print("last words", flush=True)
        subprocess.Popen(["sleep", "600"], close_fds=False)  # keeps the rank's pipe open
        os._exit(7)
    time.sleep(600)


def test_a_rank_that_ends_without_an_answer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RankDiedError, match=r"rank 1 .* exit code 7(.|\n)*last words"):
        run_ranks(die_in_rank_one, 2, str(tmp_path))
    assert not noted_pids_alive(tmp_path)


def start_a_program(folder: str) -> None:
    program = subprocess.Popen(["sleep", "600"])
    Path(folder, "program").write_text(str(program.pid))


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    run_ranks(start_a_program, 1, str(tmp_path))
    assert not still_running([int((tmp_path / "program").read_text())])


def wait_for_ever(folder: str) -> None:
    note_pid(folder)
    time.sleep(600)


def test_ranks_end_when_the_tests_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys\nsys.path[0] = {str(ROOT)!r}\n"
        "from launch.runtime import fork_server\n"
        "from launch.runtime.fork_server import run_ranks\n"
        "from tests.unit.test_run_ranks import wait_for_ever\n"
        "fork_server.PRELOAD.clear()\n"  # these ranks need nothing of it
        f"if __name__ == '__main__':\n    run_ranks(wait_for_ever, 2, {str(folder)!r})\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    try:
        while len(list(folder.iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        processes = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert len(processes) == 4  # two ranks, the fork server, the resource tracker
    assert not still_running([process.pid for process in processes])
