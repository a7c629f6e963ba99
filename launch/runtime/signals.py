"""End a rank when its launcher dies or on Ctrl-C; on SIGTERM or SIGUSR1, let it save first."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from launch.runtime.failures import end

PR_SET_PDEATHSIG = 1
LOOK_EVERY_SECONDS = 1.0
# A failure is reported by the failed rank, or by one that lost the connection to it. A rank that
# gets a signal prints only if no other rank has reported an error.
STOPPED_BY_SIGNAL = (
    75  # the exit code of a run that a signal has stopped, and that has saved; EX_TEMPFAIL
)
# DeepSpeed's launcher and torchrun kill a rank 30 s after they have sent it SIGTERM; so does Kubernetes.
SAVE_WITHIN_SECONDS = 25.0
REASONS = {
    signal.SIGINT: "interrupted by Ctrl-C (SIGINT)",
    signal.SIGTERM: "ended by SIGTERM: another rank died, or somebody stopped the job",
    signal.SIGUSR1: "ended by SIGUSR1: somebody stopped the job",
}
_SAVE_ON = (signal.SIGTERM, signal.SIGUSR1)
_saves = threading.Event()
_asked = threading.Event()


def save_on_signal() -> None:
    """From now on, SIGTERM and SIGUSR1 do not end this rank, but `stop_asked` says that one came.

    SIGTERM ends it nevertheless if it has not saved and exited within 25 s, or if the launcher has sent it
    because another rank of this host has died: then no step can finish.
    """
    _saves.set()


def stop_asked() -> bool:
    """Whether this rank was asked to save and stop."""
    return _asked.is_set()


def end_with_launcher() -> None:
    """End this rank when the launcher, or the `deepspeed` command above it, is killed.

    On SIGKILL the launcher cannot clean up, and its ranks would keep running.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if "deepspeed.launcher.launch" not in _command_line(launcher):
        return
    command = _parent(launcher)
    # On another host, launch.py's parent may be a shell or a daemon, which can exit at any time.
    if command is not None and "deepspeed" in _command_line(command):
        threading.Thread(target=_end_with, args=(launcher, command), daemon=True).start()


def _end_with(launcher: int, command: int) -> None:
    while _parent(launcher) == command:
        time.sleep(LOOK_EVERY_SECONDS)
    end("the deepspeed command was killed, and this run ends with it", 1)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int | None:
    found = _state_and_parent(pid)
    return int(found[1]) if found else None


def _state_and_parent(pid: int) -> tuple[str, str] | None:
    """A process's state (Z: it has ended) and its parent's pid; None if there is no such process."""
    try:
        # The name in parentheses may itself contain spaces and parentheses.
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return state, parent


def install_signal_handlers() -> None:
    """End with one line on SIGINT, SIGTERM and SIGUSR1, even while the main thread waits in a collective.

    Python runs signal handlers in the main thread, between bytecodes. A rank whose peer is gone may
    never get there, and the launcher would wait 30 seconds for it, so a thread handles the signals.
    """
    listening, telling = os.pipe()
    os.set_blocking(telling, False)
    signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    for number in REASONS:
        signal.signal(number, lambda _number, _frame: None)
    # A child forked without exec (a `datasets` worker) must not print our error.
    os.register_at_fork(after_in_child=_forget_signals)
    threading.Thread(target=_listen, args=(listening,), daemon=True).start()


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in REASONS:
        signal.signal(number, signal.SIG_DFL)


def _listen(listening: int) -> None:
    while True:
        for number in os.read(listening, 64):
            if number not in REASONS:
                continue
            if _saves.is_set() and number in _SAVE_ON and _every_rank_lives():
                if number == signal.SIGTERM and not _asked.is_set():
                    timer = threading.Timer(SAVE_WITHIN_SECONDS, _end, (number,))
                    timer.daemon = True
                    timer.start()
                _asked.set()
            else:
                _end(number)


def _end(number: int) -> None:
    reason = REASONS[signal.Signals(number)]
    end(f"{reason}; what was saved is whole, go on with --resume auto", 128 + number)


def _every_rank_lives() -> bool:
    """Whether the launcher of this host still has all of its ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    launcher = os.getppid()
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:  # the kernel has no such list
        return True
    found = [_state_and_parent(int(pid)) for pid in children]
    return len([child for child in found if child and child[0] != "Z"]) >= ranks
