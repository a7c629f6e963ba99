"""End a process on an error: one line from one rank instead of a traceback, and an exit code.

Only the first rank to fail on a host prints an error. The others fail as a consequence: they lose
the connection to it, or the launcher kills them.
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

from launch.errors import UserError, missing_package

EXIT_DEFECT = 1


EXIT_USER_ERROR = 2


# When one rank exits, the launcher kills the others. Rank 0 gets this head start, so that an error
# on all ranks is reported once, by rank 0.
OTHER_RANKS_WAIT_SECONDS = 5.0


# An empty file with this prefix marks that a rank has reported its error. Files are the only state
# that the ranks still share at that point.
SPOKEN = "train-has-failed-"


# Messages of gloo, NCCL and the rendezvous store when the peer is gone.
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
    """Turn user errors into one `error:` line on stderr and exit code 2, on every rank.

    The loss of another rank also gives one line, with exit code 1. Anything else is a bug and keeps
    its traceback.
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
        # Skip the normal interpreter exit: a thread waiting in a collective must not block it.
        sys.stdout.flush()
        os._exit(EXIT_DEFECT)


def end(message: str, code: int) -> None:
    """Exit at once, and print `error: message` unless another rank has reported an error."""
    if _first_to_speak():
        rank = int(os.environ.get("RANK", "0"))
        place = f"[rank {rank}] " if rank else ""
        # A single write, so that output of other ranks cannot split the line.
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"error: {place}{' '.join(message.split())}\n".encode())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _in_words(error: Exception) -> str | None:
    if lacking := missing_package(error):
        return lacking
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.errno in DISK:
        place = error.filename or "a file of this run"
        return f"{place}: {error.strerror}; {DISK[error.errno]}, then go on with --resume auto"
    if is_out_of_memory(error):
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the host."""
    return isinstance(error, MemoryError | RuntimeError) and any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def _is_lost_peer(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def _first_to_speak() -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    folder, launcher = Path(tempfile.gettempdir()), os.getppid()
    # Containers on several hosts may share a folder, and the launcher is often PID 7 in each.
    spoken = f"{SPOKEN}{platform.node()}-"
    with contextlib.suppress(OSError, ValueError):
        for left in folder.glob(f"{spoken}*"):  # left by earlier launchers
            if not Path(f"/proc/{left.name.removeprefix(spoken).split('-')[0]}").exists():
                left.unlink()
    # torchrun restarts failed ranks under the same launcher.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"{spoken}{launcher}-{os.environ.get('MASTER_PORT', '')}-{attempt}"
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # disk full: better to report twice than not at all
        return True
    return True
