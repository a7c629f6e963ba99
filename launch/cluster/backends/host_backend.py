"""Code shared by jobs on ssh hosts, for any start command: checks, supervisor, state, cancel."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

import psutil

from launch.cluster.hosts import check_hosts, hosts_of, master_port
from launch.cluster.job import Job
from launch.cluster.job_store import Record, State
from launch.cluster.supervise import STOPPED, end_everywhere, write_exit_code
from launch.errors import UserError

ENDS_WITHIN_SECONDS = 90.0
PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")


class HostBackend:
    """Subclasses name the script and the program that it needs, and render the files."""

    script: str
    program: str
    package: str
    on_every_host: bool  # whether the program is needed on every host, not only here

    @cached_property
    def _port(self) -> dict[str, int]:
        return {}

    def port(self, job: Job) -> int:
        """The job's port: drawn once, so that the check and the files agree."""
        return self._port.setdefault(str(job.folder), master_port(job))

    def check_paths(self, job: Job) -> None:
        """Reject paths that a shell along the way would split.

        Raises:
            UserError: naming the path.
        """
        for path in (job.checkout, job.folder, job.python):
            if not PLAIN_PATH.fullmatch(str(path)):
                raise UserError(
                    f"--cluster {job.cluster}: '{path}' has characters that a shell on the way would "
                    "change; use letters, digits and -_./"
                )

    def check(self, job: Job) -> None:
        """Ask each host whether it can run the job.

        Raises:
            UserError: for the first problem found.
        """
        for program, package in ((self.program, self.package), ("ssh", "openssh-client")):
            if not shutil.which(program):
                raise UserError(
                    f"--cluster {job.cluster}: there is no {program} on this machine; run: apt-get "
                    f"install {package}"
                )
        check_hosts(job, self.port(job), {self.program: self.package} if self.on_every_host else {})

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Start the supervisor, which keeps running after this command."""
        (job.folder / "exit_code").unlink(missing_ok=True)
        (job.run / "STOP").unlink(missing_ok=True)
        hosts = list(hosts_of(job))
        log_file = job.folder / "job.log"
        if log_file.exists():  # from an earlier job, whose errors do not belong to this one
            log_file.replace(log_file.with_name(time.strftime("job_until_%Y%m%d-%H%M%S.log")))
        with log_file.open("a") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "launch.cluster.supervise", str(job.folder), self.script,
                 job.python, *hosts],
                cwd=job.checkout, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        started = psutil.Process(supervisor.pid).create_time()
        details = {
            "supervisor": str(supervisor.pid),
            "started": repr(started),
            "machine": platform.node(),
            "python": job.python,
            "hosts": " ".join(hosts),
        }
        return f"{job.cluster}-{time.strftime('%H%M%S')}-{supervisor.pid}", details

    def state(self, record: Record) -> State:
        """Derived from the supervisor's exit code, or from whether it is alive."""
        file = Path(record.folder) / "exit_code"
        if not file.exists():
            if record.details["machine"] != platform.node():
                return State(
                    "unknown", f"it was submitted from {record.details['machine']}: ask there"
                )
            if self._supervisor(record) is not None:
                return State("running", record.details["hosts"])
            if not file.exists():  # it may have ended between the two checks
                return State(
                    "failed", "its supervisor was killed; submit.py cancel ends what is left"
                )
        code = int(file.read_text())
        if code == STOPPED:
            return State("cancelled")
        if code:
            return State("failed", f"exit code {code}")
        if record.finished:
            return State("completed")
        return State("failed", "the job ended before the run did: it was asked to save and end")

    def cancel(self, record: Record) -> None:
        """End the job on every host, through its supervisor if possible.

        Raises:
            UserError: naming the host on which processes may remain.
        """
        folder = Path(record.folder)
        if (folder / "exit_code").exists():
            return
        if record.details["machine"] != platform.node():
            raise UserError(
                f"{record.id}: it was submitted from {record.details['machine']}; cancel it there"
            )
        supervisor = self._supervisor(record)
        if supervisor is not None:
            os.kill(supervisor.pid, signal.SIGTERM)
            deadline = time.monotonic() + ENDS_WITHIN_SECONDS
            while self._supervisor(record) is not None and time.monotonic() < deadline:
                time.sleep(0.2)
        if not (folder / "exit_code").exists():
            hosts = record.details["hosts"].split()
            left = end_everywhere(folder, record.details["python"], hosts)
            if left:
                raise UserError(f"{record.id}: {'; '.join(left)}; processes may be left there")
            write_exit_code(folder, STOPPED)

    def _supervisor(self, record: Record) -> psutil.Process | None:
        try:
            process = psutil.Process(int(record.details["supervisor"]))
            same = repr(process.create_time()) == record.details["started"]
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same and alive else None
