"""Functions in several ranks, as the fork server of `launch/runtime/fork_server.py` runs them."""

import os
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from typing import Any

from launch.runtime.fork_server import RankDiedError, RanksTimeoutError, run_ranks, start_server

__all__ = ["RankDiedError", "RanksTimeoutError", "forked_local_ranks", "run_ranks", "share_server"]


def forked_local_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """In the place of `run_local_ranks` of the scripts, whose ranks import everything anew."""
    run_ranks(function, world_size, *args, show=None)


SERVER = "TEST_FORK_SERVER"  # where it listens


def share_server(is_worker: bool) -> None:
    """One fork server for pytest's controller, which starts it, and its workers, which find it.

    Each of their own would import for ten seconds of a core. It ends with the controller.
    """
    if not is_worker:
        start_server()
        os.environ[SERVER] = vars(_forkserver())["_forkserver_address"]
        return
    _, alive = os.pipe()  # each rank is handed one; the server watches the controller's
    vars(_forkserver()).update(_forkserver_address=os.environ[SERVER], _forkserver_alive_fd=alive)
    for each in (forkserver, _forkserver()):
        vars(each)["ensure_running"] = resource_tracker.ensure_running


def _forkserver() -> object:
    server: object = vars(forkserver)["_forkserver"]
    return server
