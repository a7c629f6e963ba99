"""Functions in several ranks, as the fork server of `launch/runtime/fork_server.py` runs them."""

from launch.runtime.fork_server import RankDiedError, RanksTimeoutError, run_ranks

__all__ = ["RankDiedError", "RanksTimeoutError", "run_ranks"]
