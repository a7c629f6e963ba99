"""Ranks of one machine end together; they import this file, which imports next to nothing."""

import os
import signal
import time

import psutil
import pytest

from launch.errors import UserError
from launch.runtime.local_launcher import run_local_ranks


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
