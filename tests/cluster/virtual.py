"""Two virtual hosts and a login node on this machine: real Slurm, ssh and MPI between them.

A host has a network, process ids, mounts, a name, /tmp and /dev/shm of its own, an sshd and a slurmd,
and eight GPUs that Slurm believes in. Other files are shared, as on a cluster's common disk.
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock

from launch.paths import ROOT
from tests.cli.commands import OF_A_RANK, Ended
from tests.cluster.slurm_files import (
    ENVIRONMENT,
    ETC,
    HOST_START,
    HUB_ADDRESS,
    HUB_START,
    NAMESPACES,
    NETWORK,
    PATH,
    STATE,
    check_machine,
    do,
    end_all,
    is_made_by,
    own_tmp,
    remove,
    write_etc,
    write_files,
)  # fmt: skip

PREFIX = "vc"  # of every name: vc<process id><a letter for each cluster of a process>-<host>
UP_WITHIN_SECONDS = 600.0
REMOVING = "/run/lock/virtual-clusters"  # of this machine, whatever TMPDIR a worker has
_alive: list[str] = []  # the clusters of this process


def remove_stale() -> None:
    """Remove what the clusters of dead processes have left; the tests' workers take turns."""
    with FileLock(REMOVING):
        places = (NAMESPACES, ETC, STATE)
        found = {file.name for place in places for file in place.glob(f"{PREFIX}*")}
        for cluster in {name.partition("-")[0] for name in found} - set(_alive):
            pid = cluster.removeprefix(PREFIX).rstrip("abcdefghijklmnopqrstuvwxyz")
            if pid.isdecimal() and not is_made_by(int(pid), STATE / cluster / "slurm.conf"):
                remove(cluster)


class Cluster:
    """A hub (login node with slurmctld) and two hosts, from `up` to `down`."""

    def __init__(self) -> None:
        letter = next(c for c in "abcdefghijklmnopqrstuvwxyz" if self._name(c) not in _alive)
        self.name = self._name(letter)
        self.hub = f"{self.name}-hub"
        self.hosts = (f"{self.name}-n1", f"{self.name}-n2")
        self._state = STATE / self.name
        self.folder = self._state / "shared"
        self.environment = {"SLURM_CONF": str(self._state / "slurm.conf")}
        self._addresses = {host: f"{NETWORK}.{i}" for i, host in enumerate(self.hosts, 1)}
        self._first: dict[str, subprocess.Popen[bytes]] = {}  # by host: what holds its namespaces
        self._started: list[subprocess.Popen[str]] = []
        self._pid = os.getpid()

    @staticmethod
    def _name(letter: str) -> str:
        return f"{PREFIX}{os.getpid()}{letter}"

    def up(self) -> None:
        """Start everything; raises UserError where this machine lacks something."""
        check_machine()
        remove_stale()
        _alive.append(self.name)
        atexit.register(self.down)
        write_files(self._state, self.hub, self._addresses)
        self.folder.mkdir()
        do("ip", "netns", "add", self.hub)
        do("ip", "-n", self.hub, "link", "set", "lo", "up")
        do("ip", "-n", self.hub, "link", "add", "br0", "type", "bridge")
        do("ip", "-n", self.hub, "address", "add", f"{HUB_ADDRESS}/24", "dev", "br0")
        do("ip", "-n", self.hub, "link", "set", "br0", "up")
        programs = {name: shutil.which(name, path=PATH) for name in ("munged", "slurmctld")}
        self._begin(self.hub, HUB_START.format(name=self.hub, folder=self._state, **programs))
        for host in self.hosts:
            self._boot(host)
        for host in self.hosts:
            self._wait_for_host(host)

    def down(self) -> None:
        """End every process, and remove every name and file; what is gone already is no error."""
        if self.name not in _alive or os.getpid() != self._pid:
            return
        remove(self.name)
        for first in self._first.values():
            first.wait()
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        _alive.remove(self.name)
        atexit.unregister(self.down)

    def _boot(self, host: str) -> None:
        address = self._addresses[host]
        port = self._port(host)
        mac = f"02:00:00:00:00:0{address[-1]}"  # the same after a new start, when others know it
        do("ip", "netns", "add", host)
        do("ip", "-n", host, "link", "set", "lo", "up")
        do("ip", "-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0",
            "address", mac, "netns", host)  # fmt: skip
        do("ip", "-n", self.hub, "link", "set", port, "master", "br0", "up")
        do("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        do("ip", "-n", host, "link", "set", "eth0", "up")
        programs = {name: shutil.which(name, path=PATH) for name in ("sshd", "slurmd")}
        keep = [self._state, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        tmp = own_tmp(self._state, keep)
        self._begin(host, HOST_START.format(name=host, folder=self._state, own_tmp=tmp, **programs))

    @staticmethod
    def _port(host: str) -> str:
        return f"to-{host[-2:]}"

    def _begin(self, host: str, script: str) -> None:
        write_etc(ETC / host, self._state, self.hub, self._addresses)
        with (self._state / f"log/{host}.log").open("ab") as log:
            # A host ends with this process, however that ends.
            self._first[host] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host, "unshare", "--mount",
                 "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", script],
                env={"PATH": PATH, **self.environment}, cwd="/",
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._until(lambda: self._init(host) is not None, f"{host} does not start")

    def _init(self, host: str) -> int | None:
        """The process id, as seen here, of process 1 of a host; None: the host is off."""
        if host not in self._first:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._first[host].pid).children():
                if child.name() == "bash":
                    return int(child.pid)
        return None

    def _wait_for_host(self, host: str) -> None:
        states = ["sinfo", "--noheader", "--node", host, "--Format", "StateLong:30"]
        down = ("down", "unknown", "*", "drain")
        self._until(lambda: self.run(["ssh", host, "true"]).code == 0, f"no ssh to {host}")
        self._until(
            lambda: (e := self.run(states)).code == 0 and not any(w in e.output for w in down),
            f"Slurm does not see {host}",
        )

    def _until(self, true: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + UP_WITHIN_SECONDS
        while not true():
            if time.monotonic() > deadline:
                logs = sorted((self._state / "log").iterdir())
                text = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
                raise AssertionError(f"{otherwise}\n{text}")
            time.sleep(0.05)

    def _inside(self, command: Sequence[str | Path], host: str | None, cwd: Path) -> list[str]:
        pid = self._init(host or self.hub)
        if pid is None:
            raise AssertionError(f"{host} is off")
        # The folder is entered inside: from outside it could be another, under a hidden path.
        enter = ["nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
        # A shell starts what it puts into the background with SIGINT ignored, and so would we all.
        plain = ["env", "--default-signal=INT", "--chdir", str(cwd)]
        return [*enter, *plain, *(str(part) for part in command)]

    def start(
        self,
        command: Sequence[str | Path],
        host: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> "subprocess.Popen[str]":
        """Start a command on a host (None: the hub); to signal it: `os.killpg(process.pid, ...)`."""
        # The hosts do not have this session's folder for temporary files.
        inherited = {k: v for k, v in os.environ.items() if k not in (*OF_A_RANK, "TMPDIR")}
        process = subprocess.Popen(
            self._inside(command, host, cwd),
            env={**inherited, "PATH": PATH, **self.environment, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(
        self,
        command: Sequence[str | Path],
        host: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        timeout: float = 120.0,
    ) -> Ended:
        """Run a command on a host (None: the hub) to its end, within `timeout` seconds."""
        process = self.start(command, host, env, cwd)
        self._started.remove(process)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{command} runs after {timeout} s:\n{output}") from None
        return Ended(process.returncode, output)

    def ranks(self, host: str) -> list[psutil.Process]:
        """The living ranks and per-host launchers on a host, with process ids as seen here."""
        init = self._init(host)
        if init is None:
            return []
        space = Path(f"/proc/{init}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() != space:
                    continue
                line = process.cmdline()  # of a zombie: empty
                if any(p.endswith("launch/train.py") or "deepspeed.launcher" in p for p in line):
                    found.append(process)
        return found

    def kill_host(self, host: str) -> None:
        """Cut a host's power: nothing of it is heard any more, not even the end of a connection."""
        do("ip", "-n", self.hub, "link", "delete", self._port(host))
        end_all(host)
        self._first.pop(host).wait()
        do("ip", "netns", "delete", host)

    def start_host(self, host: str) -> None:
        """Start a host that was killed; returns when ssh and Slurm reach it."""
        self._boot(host)
        self._wait_for_host(host)

    @contextmanager
    def limit(self, rate: str) -> Iterator[None]:
        """Let each host send no faster than `rate`, as `tc` writes it: "100mbit"."""
        for host in self.hosts:
            # Room for the largest packet that the kernel hands down, and no loss for want of room.
            do("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf",
               "rate", rate, "burst", "128kb", "latency", "400ms")  # fmt: skip
        try:
            yield
        finally:
            for host in self.hosts:
                if self._init(host) is not None:
                    do("ip", "netns", "exec", host, "tc", "qdisc", "delete", "dev", "eth0", "root")

    def sent_bytes(self, host: str) -> int:
        """What a host has sent to the others, in bytes with headers."""
        shown = subprocess.run(
            ["ip", "-n", host, "-json", "-statistics", "link", "show", "eth0"],
            capture_output=True, text=True, check=True, env=ENVIRONMENT,
        )  # fmt: skip
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])

    @contextmanager
    def hide(self, host: str, path: str | Path) -> Iterator[None]:
        """Lay an empty folder over `path`, for one host alone."""
        with self._mounted(host, ["mount", "-t", "tmpfs", "hidden", path]):
            yield

    @contextmanager
    def replace(self, host: str, path: str | Path, by: str | Path) -> Iterator[None]:
        """Lay the file or folder `by` over `path`, for one host alone."""
        with self._mounted(host, ["mount", "--bind", by, path]):
            yield

    @contextmanager
    def _mounted(self, host: str, mount: Sequence[str | Path]) -> Iterator[None]:
        before = self._init(host)
        ended = self.run(mount, host, cwd=Path("/"))
        assert ended.code == 0, ended.output
        try:
            yield
        finally:
            if self._init(host) == before:  # else the host is off, or was, and has forgotten it
                self.run(["umount", "--lazy", mount[-1]], host, cwd=Path("/"))
