"""Kill the remaining processes of a job on this host. Needs only Python.

    python3 launch/cluster/kill_job.py /shared/runs/gpt/20261123-020000/job

A process belongs to the job if its arguments contain both the training script and a path in the
job's folder, which is unique: the ranks, their launcher, and the commands that started them. So
does a process that runs the job's node.sh: mpirun, whose arguments lack the training script.
"""

import os
import signal
import sys
import time
from pathlib import Path

SCRIPT = "launch/train.py"
SECONDS_TO_END = 10.0


def processes_of(folder: str) -> list[int]:
    """The PIDs of the job's live processes on this host."""
    node_script = {"bash", f"{folder}/node.sh"}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        training = SCRIPT in words and any(f"{folder}/" in word for word in words)
        if training or node_script <= set(words):
            found.append(int(entry.name))
    return found


def end(folder: str) -> int:
    """End them with SIGTERM, then the remaining ones with SIGKILL; return their number."""
    there = processes_of(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + SECONDS_TO_END
        for pid in processes_of(folder):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    return len(there)


if __name__ == "__main__":
    print(end(sys.argv[1].rstrip("/")))
