"""The virtual hosts themselves: what they share, what they do not, and that nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.errors import UserError
from launch.paths import ROOT
from tests.cluster import slurm_files
from tests.cluster.slurm_files import ETC, FAKE_GPUS, NAMESPACES, STATE
from tests.cluster.virtual import PREFIX, Cluster, remove_stale

FREEZER = Path("/sys/fs/cgroup/freezer")
MEGABYTE = 1_000_000
KILLED_WHILE_UP = """
import os, signal
from tests.cluster.virtual import Cluster
cluster = Cluster()
cluster.up()
print(cluster.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def traces(name: str) -> list[str]:
    """The files, namespaces and processes of a cluster."""
    files = [
        str(file)
        for place, pattern in [
            (NAMESPACES, f"{name}-*"), (ETC, f"{name}-*"), (STATE, name),
            (FREEZER, f"slurm_{name}-*"),
        ]
        for file in place.glob(pattern)
    ]  # fmt: skip
    commands = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return files + [command for command in commands if f"{name}-" in command]


def test_ssh_reaches_both_hosts_by_name_and_each_is_its_own(cluster: Cluster) -> None:
    for host in cluster.hosts:
        assert cluster.run(["ssh", host, "hostname"]).output == f"{host}\n"
        write = "echo $(hostname) >/tmp/mine; echo $(hostname) >/dev/shm/mine"
        assert cluster.run(["sh", "-c", write], host).code == 0
    for host in cluster.hosts:
        read = cluster.run(["cat", "/tmp/mine", "/dev/shm/mine"], host)
        assert read.output == f"{host}\n{host}\n"
    first, second = cluster.hosts
    (cluster.folder / "shared").write_text("by the hub")
    assert cluster.run(["ssh", second, "cat", f"{cluster.folder}/shared"], first).output == (
        "by the hub"
    )


def test_slurm_gives_gpus_of_two_nodes(cluster: Cluster) -> None:
    assert cluster.run(["sinfo", "-h", "-o", "%D %T %G"]).output == f"2 idle gpu:{FAKE_GPUS}\n"
    show = "echo $SLURM_NODEID $(hostname) $CUDA_VISIBLE_DEVICES"
    ended = cluster.run(["srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", show])
    lines = [f"{index} {host} 0,1" for index, host in enumerate(cluster.hosts)]
    assert sorted(ended.output.splitlines()) == lines


@pytest.mark.parametrize(
    "command",
    [["pdsh", "-N", "-R", "ssh", "-w"], ["mpirun", "--allow-run-as-root", "--host"]],
    ids=["pdsh", "mpirun"],
)
def test_a_command_runs_on_both_hosts(cluster: Cluster, command: list[str]) -> None:
    ended = cluster.run([*command, ",".join(cluster.hosts), "hostname"])
    assert ended.code == 0, ended.output
    said = ended.output.splitlines()  # on a busy machine mpirun may warn of a setpgid besides
    assert sorted(line for line in said if line in cluster.hosts) == list(cluster.hosts)


def test_the_end_of_a_command_is_told(cluster: Cluster) -> None:
    ended = cluster.run(["sh", "-c", "echo $A; pwd; exit 7"], env={"A": "a b"}, cwd=Path("/usr"))
    assert (ended.code, ended.output) == (7, "a b\n/usr\n")
    with pytest.raises(AssertionError, match="begun"):
        cluster.run(["sh", "-c", "echo begun; sleep 100"], cluster.hosts[0], timeout=5)


def test_ranks_are_those_of_one_host(cluster: Cluster) -> None:
    first, second = cluster.hosts
    process = cluster.start(["bash", "-c", "echo up; exec -a launch/train.py sleep 100"], first)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    deadline = time.monotonic() + 100
    while not cluster.ranks(first) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [rank.name() for rank in cluster.ranks(first)] == ["sleep"]
    assert cluster.ranks(second) == []
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(100) != 0
    assert cluster.ranks(first) == []


def test_a_path_is_hidden_or_replaced_on_one_host_alone(cluster: Cluster) -> None:
    first, second = cluster.hosts
    data = cluster.folder / "data"
    data.mkdir()
    file, other = data / "file", cluster.folder / "other"
    file.write_text("file")
    other.write_text("other")
    with cluster.hide(first, data):
        assert cluster.run(["ls", "-A", data], first).output == ""
        assert cluster.run(["ssh", first, "ls", "-A", str(data)]).output == ""
        assert cluster.run(["ls", data], second).output == "file\n"
    with cluster.replace(second, file, other):
        assert cluster.run(["cat", file], first).output == "file"
        assert cluster.run(["cat", file], second).output == "other"
        assert file.read_text() == "file"
    for host in cluster.hosts:
        assert cluster.run(["cat", file], host).output == "file"


def test_a_limited_link_is_slow_and_its_bytes_are_counted(cluster: Cluster) -> None:
    first, second = cluster.hosts
    send = ["sh", "-c", f"head -c {4 * MEGABYTE} /dev/zero | ssh {second} wc -c"]
    with cluster.limit("20mbit"):
        before, began = cluster.sent_bytes(first), time.monotonic()
        ended = cluster.run(send, first)
        seconds, sent = time.monotonic() - began, cluster.sent_bytes(first) - before
    assert ended.output.split() == [str(4 * MEGABYTE)]
    assert 4 * MEGABYTE < sent < 5 * MEGABYTE
    # 20 Mbit/s are 2.5 MB/s; what the limiter lets through at once comes on top.
    assert sent / seconds < 1.2 * 2.5 * MEGABYTE
    shown = ["tc", "qdisc", "show", "dev", "eth0"]
    assert all("tbf" not in cluster.run(shown, host).output for host in cluster.hosts)


def test_a_host_loses_its_power_and_comes_back(cluster: Cluster) -> None:
    first, second = cluster.hosts
    ssh = ["ssh", "-o", "ConnectTimeout=2", second, "true"]
    job = cluster.start(["sleep", "100"], second)
    cluster.kill_host(second)
    try:
        assert job.wait(10) != 0
        assert cluster.run(ssh, first).code == 255
        with pytest.raises(AssertionError, match="is off"):
            cluster.run(["true"], second)
        assert cluster.ranks(second) == []
    finally:
        cluster.start_host(second)
    assert cluster.run(ssh, first).code == 0
    assert cluster.run(["srun", "--nodes=2", "true"]).code == 0


@pytest.fixture
def another(cluster: Cluster) -> Iterator[Cluster]:
    made = Cluster()
    made.up()
    yield made
    made.down()


def test_nothing_is_left_of_a_cluster_beside_another(cluster: Cluster, another: Cluster) -> None:
    assert another.name != cluster.name
    job = another.start(["srun", "--nodes=2", "sh", "-c", "echo up; sleep 100 & sleep 100"])
    assert job.stdout is not None
    assert [job.stdout.readline() for _ in another.hosts] == ["up\n", "up\n"]
    spaces = [NAMESPACES / f"{another.name}-{end}" for end in ("hub", "n1", "n2")]
    listed = [subprocess.check_output(["ip", "netns", "pids", s.name]).split() for s in spaces]
    pids = [int(pid) for each in listed for pid in each]
    assert len(pids) > 10
    another.down()
    assert traces(another.name) == []
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert cluster.run(["sinfo", "-h", "-o", "%D %T"]).output == "2 idle\n"


def test_what_a_killed_session_leaves_is_removed() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_UP], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    name = ended.stdout.strip()
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert traces(name) != []
    # A number that another process has by now protects nothing.
    reused = STATE / f"{PREFIX}{os.getppid()}a"
    reused.mkdir()
    (reused / "slurm.conf").touch()
    os.utime(reused / "slurm.conf", (0, 0))
    remove_stale()
    assert not reused.exists()
    assert traces(name) == []


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_files, "PROGRAMS", ("bash", "no-such-slurmctld"))
    with pytest.raises(UserError, match=r"no-such-slurmctld missing; run `scripts/setup.sh test`"):
        Cluster().up()
