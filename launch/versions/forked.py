"""Run functions in forks of this process, which has imported torch and DeepSpeed once for all of them.

A fork takes milliseconds where an import takes ten seconds, and nothing of a run is left in the next
one. The process must not have computed with torch before: its threads do not survive a fork.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("fork")
LONGEST_REASON = 160


class DidNotRunError(Exception):
    """A fork raised, died or took too long; the message is one line that says which."""


def run_forked(
    function: Callable[..., Any], ranks: int, args: tuple[Any, ...], limit: float
) -> list[Any]:
    """Call `function(*args, rank, folder)` in `ranks` forks at once; the results, in rank order.

    `folder` is an empty one that is theirs alone. The first failure ends them all.

    Raises:
        DidNotRunError: if a fork raised an exception, died, or did not end within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    pipes: list[Connection] = []
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        try:
            for rank in range(ranks):
                ours, theirs = CONTEXT.Pipe()
                process = CONTEXT.Process(
                    target=_in_fork, args=(theirs, function, args, rank, folder)
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            return _collect(pipes, deadline, limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline: float, limit: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DidNotRunError(f"rank {min(waiting.values())} did not end within {limit:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                value, problem = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise DidNotRunError(f"rank {waiting[pipe]} died") from None
            if problem:
                raise DidNotRunError(problem)
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _in_fork(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], rank: int, folder: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    log = os.open(Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)  # DeepSpeed prints
    os.dup2(log, 2)
    try:
        answer = (function(*args, rank, folder), "")
    except BaseException as error:
        answer = (None, _reason(error))
    pipe.send_bytes(pickle.dumps(answer))
    signal.pause()  # the others may still need our end of the process group


def _reason(error: BaseException) -> str:
    """The exception in one line, with the place in DeepSpeed where it was raised."""
    said = " ".join(str(error).split())[:LONGEST_REASON]
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/deepspeed/" in f.filename]
    where = f" ({Path(inside[-1].filename).name}:{inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {said}{where}"
