"""Supervise a job on ssh hosts until it is over, and end it everywhere if any part fails.

    python -m launch.cluster.supervise JOB_FOLDER SCRIPT PYTHON HOST ...

`deepspeed` over pdsh does not: if a rank on one host fails, it waits for the others to end by
themselves, and it forwards no signals. The job's output is in job.log, its result in exit_code.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NoReturn

from launch.cluster import kill_job
from launch.cluster.error_log import collect_errors
from launch.errors import UserError
from launch.runtime.ssh import run_on_host

# pdsh's message when the command on a host exits with a nonzero code.
HOST_ENDED = re.compile(r"pdsh@\S+: (\S+): (?:ssh exited with exit code (\d+)|.*)")
GRACE_SECONDS = 10.0  # for the other ranks to report why they end, and for the front end to exit
STOPPED = 143


class _Stopped(Exception):
    """The job was asked to stop."""


def end_everywhere(folder: Path, python: str, hosts: Sequence[str]) -> list[str]:
    """End a job's remaining processes here and on its hosts; return a line for each failure.

    `python` is the interpreter on the hosts; the submission has checked that each has it.
    """
    program = Path(kill_job.__file__).read_text()

    def end(host: str) -> str | None:
        try:
            run_on_host(host, [python, "-", str(folder)], stdin=program, timeout=40)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=32) as pool:
        asked = pool.map(end, hosts)
        kill_job.end(str(folder))
        return [line for line in asked if line]


def supervise(folder: Path, script: str, python: str, hosts: Sequence[str]) -> int:
    """Run the job's script until it ends or a host fails; return the exit code."""
    with (folder / "job.log").open("a", buffering=1) as log:
        command = subprocess.Popen(
            ["bash", str(folder / script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            code = _watch(command, log)
        except _Stopped:
            log.write("stopped: submit.py cancel, or a signal to the supervisor\n")
            code = STOPPED
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if code:
            for line in end_everywhere(folder, python, hosts):
                log.write(f"error: {line}; processes may be left there\n")
            _end_command(command)
            logs = sorted((folder / "logs").glob("*.log"))
            for words in collect_errors(logs, submitted=folder / script):
                log.write(f"error: {words}\n")
    return code


def _watch(command: "subprocess.Popen[str]", log: IO[str]) -> int:
    assert command.stdout is not None
    for line in command.stdout:
        log.write(line)
        ended = HOST_ENDED.match(line)
        if ended:
            # The others now lose their peer, and report that better than they would a signal.
            time.sleep(GRACE_SECONDS / 2)
            return int(ended.group(2) or 1)
    return command.wait()


def _end_command(command: "subprocess.Popen[str]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(command.pid, number)
            command.wait(GRACE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    command.wait()


def main() -> NoReturn:
    """Supervise, and write the exit code to a file atomically."""
    folder, script, python, *hosts = sys.argv[1:]

    def stop(_number: int, _frame: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = supervise(Path(folder), script, python, hosts)
    write_exit_code(Path(folder), code)
    sys.exit(code)


def write_exit_code(folder: Path, code: int) -> None:
    """Record that the job is over, and its exit code."""
    unfinished = folder / ".exit_code"
    unfinished.write_text(f"{code}\n")
    unfinished.replace(folder / "exit_code")


if __name__ == "__main__":
    main()
