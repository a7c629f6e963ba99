"""Run ranks on this machine without a launcher; if one fails, all end."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from launch.errors import UserError

# A fresh interpreter per rank: ranks must not inherit our torch and CUDA state.
CONTEXT = multiprocessing.get_context("spawn")
SECONDS_TO_LEAVE = 10.0
RANKS_WITHOUT_GPU = 2


def choose_ranks(asked: int | None, model_parallel_size: int = 1) -> int:
    """The number of ranks to start: `asked`, by default one per GPU, or two without GPUs.

    If that default is no multiple of `model_parallel_size`, it is that size, and stderr says so.

    Raises:
        UserError: if `asked` is below one or above the number of GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    ranks = (gpus or RANKS_WITHOUT_GPU) if asked is None else asked
    if asked is None and ranks % model_parallel_size:
        ranks = model_parallel_size
        print(
            f"--ranks: {ranks}, the fewest that the recipe's parallel block takes", file=sys.stderr
        )
    if ranks < 1:
        raise UserError(f"--ranks: {ranks} is no number of ranks; use 1 or more")
    if gpus and ranks > gpus:
        raise UserError(
            f"--ranks: {ranks} ranks need as many GPUs, and there are {gpus}; lower it, or use the "
            "CPU: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu"
        )
    return ranks


def free_port() -> int:
    """Find a free port for the rendezvous.

    It is below the kernel's ephemeral ports (from 32768 on Linux), which any connection on the
    machine could take between our check and rank 0's bind.
    """
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_local_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes, with a launcher's environment variables.

    No process outlives this call or the calling process.

    Args:
        function: a module-level function that initialises the process group. Its module must not
            import torch, so that `launch.runtime.process_group.prepare_environment` runs first.
        world_size: number of processes, one per GPU if there are GPUs.
        args: passed to every rank; must be picklable.

    Raises:
        UserError: the first one raised by a rank, or if a rank crashed or was killed.
    """
    port = free_port()
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_in_child,
                args=(theirs, rank_environment(rank, world_size, port), function, args),
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        _wait(pipes, processes)
        let_leave(pipes, processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def let_leave(pipes: Iterable[Connection], processes: Iterable[Any]) -> None:
    """Let the ranks exit after all have answered; until then rank 0 serves the rendezvous store."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send("leave")
    for process in processes:
        process.join(SECONDS_TO_LEAVE)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that `deepspeed` sets for one of `world_size` ranks on one machine."""
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
        "LOCAL_SIZE": world_size, "CROSS_RANK": 0, "CROSS_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def _wait(pipes: list[Connection], processes: list[Any]) -> None:
    waiting = dict(enumerate(pipes))
    while waiting:
        # A killed rank closes its end of the pipe, which wakes us as well.
        ready = multiprocessing.connection.wait(list(waiting.values()))
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                problem = waiting.pop(rank).recv()
            except EOFError:
                processes[rank].join(SECONDS_TO_LEAVE)
                code = processes[rank].exitcode
                raise UserError(
                    f"rank {rank} died with exit code {code}"
                    f"{'; out of memory?' if code == -9 else ''}"
                ) from None
            if problem:
                raise UserError(problem)


def _in_child(
    pipe: Connection, environment: dict[str, str], function: Callable[..., None], args: Any
) -> None:
    os.environ.update(environment)
    # DeepSpeed logs to stdout, where our caller may print JSON.
    os.dup2(2, 1)
    with _reporting(pipe):
        function(*args)
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(0)  # a normal exit is slow while the process group is alive


@contextlib.contextmanager
def _reporting(pipe: Connection) -> Iterator[None]:
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    except Exception as error:
        traceback.print_exc()
        rank = os.environ["RANK"]
        problem = f"rank {rank} failed, traceback above: {type(error).__name__}: {error}"
    pipe.send(problem)
