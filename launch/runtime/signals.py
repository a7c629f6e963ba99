"""How a rank ends when somebody else decides so: its launcher's death, Ctrl-C, SIGTERM."""

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
# Another rank's failure is told by that rank, or by one that lost the connection to it. Only where
# nobody has done so does a rank that gets a signal speak.
REASONS = {
    signal.SIGINT: "interrupted by Ctrl-C (SIGINT)",
    signal.SIGTERM: "ended by SIGTERM: another rank died, or somebody stopped the job",
}


def end_with_launcher() -> None:
    """Have this rank end when the launcher, or the `deepspeed` command above it, is killed.

    The launcher's own clean-up does not run on SIGKILL: its ranks would go on without it.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if "deepspeed.launcher.launch" not in _command_line(launcher):
        return
    command = _parent(launcher)
    # What starts launch.py on another host may be a shell or a daemon; those may come and go.
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
    try:
        # The name, in brackets, may hold spaces and brackets itself.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def install_signal_handlers() -> None:
    """End with one line on SIGINT and SIGTERM, also while the main thread waits in a collective.

    Python runs handlers in the main thread and between bytecodes, which a rank whose peer is gone
    may never reach; the launcher would wait for it for 30 seconds. So a thread listens.
    """
    listening, telling = os.pipe()
    os.set_blocking(telling, False)
    signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    for number in REASONS:
        signal.signal(number, lambda _number, _frame: None)
    # A child that is forked without exec (a worker of `datasets`) must not speak for us.
    os.register_at_fork(after_in_child=_forget_signals)
    threading.Thread(target=_listen, args=(listening,), daemon=True).start()


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in REASONS:
        signal.signal(number, signal.SIG_DFL)


def _listen(listening: int) -> None:
    while True:
        for number in os.read(listening, 64):
            if number in REASONS:
                reason = REASONS[signal.Signals(number)]
                end(f"{reason}; what was saved is whole, go on with --resume auto", 128 + number)
