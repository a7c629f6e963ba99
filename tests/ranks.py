"""Functions in several ranks, as the fork server of `launch/runtime/fork_server.py` runs them."""

from collections.abc import Callable
from typing import Any

from launch.runtime.fork_server import RankDiedError, RanksTimeoutError, run_ranks

__all__ = ["RankDiedError", "RanksTimeoutError", "forked_local_ranks", "run_ranks"]


def forked_local_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """In the place of `run_local_ranks` of the scripts, whose ranks import everything anew."""
    run_ranks(function, world_size, *args, show=None)
