"""Run a function in several ranks, in fresh processes, for about a second a call.

Importing torch and deepspeed takes seconds; a fork server imports them once, and each rank is a
fork of it. Nothing of a run is left in the next one: no process group, no `deepspeed` global. The
server never starts CUDA, so each rank can: with `env`, on GPUs of its own. Several threads may run
ranks at once.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from launch.runtime.local_launcher import free_port, let_leave, rank_environment

Result = TypeVar("Result")

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "launch.runtime.gc_off",
    "torch", "deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "transformers.models.llama.modeling_llama", "models.hf",
    "launch.training.engine", "launch.training.evaluate", "launch.checkpoint.safetensors_io",
    "launch.data.prepare", "launch.parity.run",
]  # fmt: skip
# Two ranks with a thread a core each would fight over the cores of a small machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# What hung ranks get to begin writing down where they are, and then to end it.
DUMP_BEGINS_SECONDS, DUMP_SECONDS = 20.0, 1.0
# Starting a process polls all others of this one, and must not meet one that is being closed; starting
# the server changes the environment for a moment.
_LOCK = threading.Lock()
OUTPUT_TAIL = 4000  # characters of a failed rank's output that go into the message


class RanksTimeoutError(Exception):
    """Some ranks did not end in time; the message shows where each of them was."""


class RankDiedError(Exception):
    """A rank's process ended without a result: killed, crashed, or `os._exit`."""


class _Rank:
    """One process, as its parent sees it. `result` stays None until the rank has answered."""

    def __init__(self, rank: int, folder: Path, payload: bytes, env: dict[str, str]) -> None:
        self.rank = rank
        self.output = folder / f"rank{rank}.out"
        self.dump = folder / f"rank{rank}.stack"
        self.result: tuple[Any] | None = None
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = CONTEXT.Process(
            target=_in_child, args=(theirs, payload, env, str(self.output), str(self.dump))
        )
        with _LOCK:
            self.process.start()
        theirs.close()

    def printed(self) -> str:
        """What the rank wrote to stdout and stderr."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def has_dumped(self) -> bool:
        """Whether the rank has begun to write where it is."""
        return self.dump.exists() and self.dump.stat().st_size > 0

    def kill(self) -> None:
        """End the process and whatever it started, and wait until it is gone."""
        pid = self.process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # its own group: see _in_child
        with _LOCK:
            self.process.kill()
            self.process.join()
            self.process.close()
        self.pipe.close()


def run_ranks(
    function: Callable[..., Result],
    world_size: int,
    *args: Any,
    timeout: float = 1000.0,
    env: Mapping[str, str] | None = None,
    show: Callable[[str], None] | None = print,
) -> list[Result]:
    """Call `function(*args)` in `world_size` processes and return the results in rank order.

    Args:
        function: a module-level function; it, `args` and its result must pickle. It finds RANK,
            WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as under the launcher, and
            starts the process group itself.
        world_size: number of processes.
        args: handed to every rank alike.
        timeout: seconds that all ranks together may take.
        env: added to the environment of every rank.
        show: is given what each rank has printed, if anything; None drops it.

    Raises:
        RanksTimeoutError: naming the ranks that hung, with the stack of each.
        RankDiedError: when a process ended without an answer.
        Exception: the first exception that a rank raised, of its own type where it pickles, with
            the rank and its traceback as a note.
    """
    payload = pickle.dumps((function, args))
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            with _LOCK:
                start_server()
                ours = dict(os.environ)
            port = free_port()
            for rank in range(world_size):
                own = rank_environment(rank, world_size, port)
                full = {**ours, **ONE_THREAD, **own, **(env or {})}
                ranks.append(_Rank(rank, Path(folder), payload, full))
            _collect(ranks, timeout)
        finally:
            for item in ranks:
                # Under pytest what is printed here is shown where the test fails.
                if show is not None and (printed := item.printed()):
                    show(f"--- rank {item.rank} ---\n{printed.rstrip()}")
                item.kill()
    return [item.result[0] for item in ranks if item.result is not None]


def _collect(ranks: list[_Rank], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while waiting := [item for item in ranks if item.result is None]:
        left = deadline - time.monotonic()
        # The pipe alone would not do: what a dead rank had started may hold it open.
        signs = [sign for item in waiting for sign in (item.pipe, item.process.sentinel)]
        ready = multiprocessing.connection.wait(signs, max(left, 0.0))
        if not ready:
            raise RanksTimeoutError(_where_they_hang(waiting, timeout))
        for item in waiting:
            if item.pipe in ready or item.process.sentinel in ready:
                _take_answer(item)
    let_leave([item.pipe for item in ranks], [item.process for item in ranks])


def _take_answer(item: _Rank) -> None:
    try:
        if not item.pipe.poll():
            raise EOFError
        value, error, text = pickle.loads(item.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        with _LOCK:  # another thread that polls would take the exit code
            item.process.join(5.0)
        raise RankDiedError(
            f"rank {item.rank} ended without a result, exit code {item.process.exitcode}; "
            f"its output:\n{item.printed()[-OUTPUT_TAIL:]}"
        ) from None
    if text is None:
        item.result = (value,)
        return
    raised = _unpickled(error)
    if raised is None:
        raise RuntimeError(f"rank {item.rank} failed:\n{text}")
    raised.add_note(f"in rank {item.rank}:\n{text}")
    raise raised


def _unpickled(error: bytes | None) -> BaseException | None:
    if error is None:
        return None
    try:
        raised = pickle.loads(error)
    except Exception:  # an exception class whose __init__ wants other arguments
        return None
    return raised if isinstance(raised, BaseException) else None


def _where_they_hang(hung: list[_Rank], timeout: float) -> str:
    for item in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(item.process.pid or 0, signal.SIGUSR1)
    deadline = time.monotonic() + DUMP_BEGINS_SECONDS
    while time.monotonic() < deadline and not all(item.has_dumped() for item in hung):
        time.sleep(0.05)
    time.sleep(DUMP_SECONDS)
    lines = [f"no answer after {timeout:g} s from rank {', '.join(str(i.rank) for i in hung)}"]
    for item in hung:
        stack = item.dump.read_text(errors="replace") if item.dump.exists() else ""
        lines += [f"rank {item.rank} was at:", stack or "(it had not begun)"]
        lines += ["its output ends:", item.printed()[-OUTPUT_TAIL:]]
    return "\n".join(lines)


def _in_child(
    pipe: Connection, payload: bytes, env: dict[str, str], output: str, dump: str
) -> None:
    os.setsid()  # a group of its own, so that what this rank starts can be ended with it
    gc.freeze()  # the server's million objects stay: to look through them takes half a second each time
    gc.enable()
    watch = threading.Thread(target=_until_told_to_leave, args=(pipe,), daemon=True)
    watch.start()
    # Kept open until the process ends: the handler below writes into it.
    stack = os.open(dump, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(env)
    pipe.send_bytes(_answer(payload))
    watch.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a live process group would take its time over a tidy end


def _until_told_to_leave(pipe: Connection) -> None:
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):  # the tests were killed: nobody else would end us
        os.killpg(0, signal.SIGKILL)


def _answer(payload: bytes) -> bytes:
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(payload)
        return pickle.dumps((function(*args), None, None))
    except BaseException as error:  # SystemExit too: the test that caused it wants to know
        text = traceback.format_exc()
        try:
            return pickle.dumps((None, pickle.dumps(error), text))
        except Exception:  # an exception that holds, say, a lock
            return pickle.dumps((None, None, text))


def start_server() -> None:
    """Start the fork server where none runs; it imports while this process goes on."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    # torch looks for GPUs when deepspeed is imported; through NVML that does not start CUDA, which
    # would not survive the fork.
    with _environment({**ONE_THREAD, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
