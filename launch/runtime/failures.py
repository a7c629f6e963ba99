"""How a process ends on an error: one line from one rank instead of a traceback, and an exit code.

Of a run's ranks on a host only the first to fail speaks. The others fail in its wake: they lose the
connection to it, or the launcher ends them.
"""

import contextlib
import errno
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.errors import UserError

EXIT_DEFECT = 1


EXIT_USER_ERROR = 2


# The first rank to exit takes the others with it (the launcher ends them). Rank 0 therefore gets
# this head start, so that a mistake that every rank finds is told once, and by rank 0.
OTHER_RANKS_WAIT_SECONDS = 5.0


# An empty file of this name says that a rank has spoken. The ranks share nothing else by then.
SPOKEN = "train-has-failed-"


# What gloo, NCCL and the rendezvous store say when the other end is gone.
LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was closed",
    "Connection refused", "remote process exited", "Timed out waiting", "Timed out after",
    "wait timeout", "ncclRemoteError", "NCCL communicator was aborted", "failed to recv",
    "Failed to recv",
)  # fmt: skip


LOST_CONNECTION = "the connection to another rank is lost"


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


DISK = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "raise the file size limit",
    errno.EROFS: "name a writable place", errno.EACCES: "name a writable place",
    errno.EPERM: "name a writable place",
}  # fmt: skip


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a person can fix into one `error:` line on stderr and exit code 2, on every rank.

    The loss of another rank is one line too, and exit code 1. Anything else keeps its traceback: it
    is a defect of ours, and the traceback is the report.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        end(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as error:
        message = _in_words(error)
        if message is not None:
            end(message, EXIT_DEFECT if _is_lost_peer(error) else EXIT_USER_ERROR)
        if _first_to_speak():
            traceback.print_exc()
        # Not a tidy end: a rank that waits in a collective's thread must not hold up its own.
        sys.stdout.flush()
        os._exit(EXIT_DEFECT)


def end(message: str, code: int) -> None:
    """End this process at once with `error: message`, unless another rank of it has told why."""
    if _first_to_speak():
        rank = int(os.environ.get("RANK", "0"))
        place = f"[rank {rank}] " if rank else ""
        # A write of its own: what other ranks print does not get between the line's parts.
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"error: {place}{' '.join(message.split())}\n".encode())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _in_words(error: Exception) -> str | None:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.errno in DISK:
        place = error.filename or "a file of this run"
        return f"{place}: {error.strerror}; {DISK[error.errno]}, then go on with --resume auto"
    if isinstance(error, MemoryError | RuntimeError) and any(w in text for w in OUT_OF_MEMORY):
        return (
            f"out of memory: {text.splitlines()[0][:200]}; lower train.micro_batch_size, set "
            "model.checkpoint_activations=true, or use a configuration that offloads"
        )
    if _is_lost_peer(error):
        return (
            f"{LOST_CONNECTION}: that rank was killed (often for its memory) or "
            "failed; what was saved is whole, go on with --resume auto "
            f"({text.splitlines()[0][:120]})"
        )
    return None


def _is_lost_peer(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def _first_to_speak() -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    folder, launcher = Path(tempfile.gettempdir()), os.getppid()
    # Containers of several hosts may share a folder, and a launcher is often process 7 in each.
    spoken = f"{SPOKEN}{platform.node()}-"
    with contextlib.suppress(OSError, ValueError):
        for left in folder.glob(f"{spoken}*"):  # of launchers that have ended since
            if not Path(f"/proc/{left.name.removeprefix(spoken).split('-')[0]}").exists():
                left.unlink()
    # torchrun starts failed ranks anew under the same launcher.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"{spoken}{launcher}-{os.environ.get('MASTER_PORT', '')}-{attempt}"
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # no room even for that: better told twice than not at all
        return True
    return True
