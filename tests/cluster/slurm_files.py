"""What virtual hosts need of the machine: files of Slurm and ssh, start scripts, and the clearing away."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from launch.errors import UserError

STATE = Path("/tmp")
GONE_WITHIN_SECONDS, FIRST_ALONE_SECONDS = 100.0, 5.0
NAMESPACES, ETC = Path("/run/netns"), Path("/etc/netns")
PROGRAMS = (
    "ip", "tc", "bash", "unshare", "nsenter", "setpriv", "mount", "umount", "munged", "slurmctld",
    "slurmd", "sbatch", "srun", "sinfo", "sshd", "ssh", "ssh-keygen", "pdsh", "mpirun",
)  # fmt: skip
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
ENVIRONMENT = {**os.environ, "PATH": PATH}  # root's programs, also for one whose PATH lacks them
PROBE = "mount -t tmpfs probe /mnt && mkdir /mnt/f && mount -t cgroup -o freezer freezer /mnt/f"
# A killed task that is frozen would never end, and its folder would stay.
REMOVE_CGROUPS = """\
mount -t cgroup -o freezer freezer "$1" || exit 0
find "$1"/slurm_"$2"* -name freezer.state -exec sh -c 'echo THAWED >"$1"' sh {} \\; 2>/dev/null
for i in $(seq 50); do
    find "$1"/slurm_"$2"* -depth -type d -exec rmdir {} \\; 2>/dev/null
    ls -d "$1"/slurm_"$2"* >/dev/null 2>&1 || exit 0
    sleep 0.1
done
exit 1
"""

FAKE_GPUS = 8
NULL_DEVICE = os.makedev(1, 3)
NETWORK = "10.77.0"
HUB_ADDRESS = f"{NETWORK}.254"

# TaskPlugin and SelectType as small as they may be; ProctrackType as in production: it decides who
# gets a signal. A requeued job waits for as long as its credential lives, 120 seconds by default.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={hub}({hub_address})
SlurmUser=root
MailProg=/bin/true
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
SlurmdTimeout=8
MessageTimeout=5
TCPTimeout=2
ReturnToService=2
KillWait=10
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
EnforcePartLimits=ALL
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=16 RealMemory=8000 Gres=gpu:{gpus}"

SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/ssh/host_{name}
AuthorizedKeysFile {folder}/ssh/id.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
PidFile none
"""
SSH_CONFIG = """\
Host {names}
  User root
  IdentityFile {folder}/ssh/id
  UserKnownHostsFile {folder}/ssh/known_hosts
  BatchMode yes
"""

# The first process of a host. bash reaps what is orphaned, as an init does. /run is the host's own,
# because its sshd wants a folder there; /dev/shm, because programs take names there.
HOST_START = """\
set -e
hostname {name}
mount -t tmpfs run /run
mkdir /run/sshd
mount -t tmpfs -o mode=1777 shm /dev/shm
{own_tmp}
mount -t tmpfs cgroup {folder}/cgroup
mkdir {folder}/cgroup/freezer
mount -t cgroup -o freezer freezer {folder}/cgroup/freezer
{sshd} -De -f {folder}/ssh/sshd_{name} &
{slurmd} -D -N {name} &
set +e
while :; do wait; sleep 1; done
"""
HUB_START = """\
set -e
hostname {name}
{munged} --foreground --socket={folder}/munge/socket --key-file={folder}/munge/key \
--pid-file={folder}/munge/pid --log-file={folder}/munge/log --seed-file={folder}/munge/seed &
{slurmctld} -D &
set +e
while :; do wait; sleep 1; done
"""


def write_files(folder: Path, hub: str, addresses: Mapping[str, str]) -> None:
    """Write all files and keys of a cluster into `folder`; `addresses`: host name to address."""
    for name in (
        "log",
        "state",
        "ssh",
        "munge",
        "cgroup",
        "tmp",
        *(f"spool.{n}" for n in addresses),
    ):
        (folder / name).mkdir(parents=True)
    # munged rejects a folder that others may write to, and clients have to reach its socket.
    (folder / "munge").chmod(0o755)
    key = folder / "munge/key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(128))
    for index in range(FAKE_GPUS):  # Slurm takes device nodes only
        os.mknod(folder / f"gpu{index}", 0o20600, NULL_DEVICE)

    nodes = [NODE.format(name=n, address=a, gpus=FAKE_GPUS) for n, a in addresses.items()]
    facts = {"hub": hub, "hub_address": HUB_ADDRESS, "folder": folder, "nodes": "\n".join(nodes)}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**facts))
    (folder / "gres.conf").write_text(
        "".join(f"NodeName={n} Name=gpu File={folder}/gpu[0-{FAKE_GPUS - 1}]\n" for n in addresses)
    )
    (folder / "cgroup.conf").write_text(
        f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n"
    )

    _make_key(folder / "ssh/id")
    known = []
    for name, address in addresses.items():
        public = _make_key(folder / f"ssh/host_{name}")
        known.append(f"{name},{address} {public}\n")
        sshd = SSHD_CONFIG.format(address=address, folder=folder, name=name)
        (folder / f"ssh/sshd_{name}").write_text(sshd)
    (folder / "ssh/known_hosts").write_text("".join(known))


def write_etc(etc: Path, folder: Path, hub: str, addresses: Mapping[str, str]) -> None:
    """Write what `ip netns exec` binds over a host's /etc: names, ssh's settings, no DNS."""
    (etc / "ssh").mkdir(parents=True, exist_ok=True)
    names = {"localhost": "127.0.0.1", hub: HUB_ADDRESS, **addresses}
    (etc / "hosts").write_text("".join(f"{a} {n}\n" for n, a in names.items()))
    (etc / "resolv.conf").touch()
    config = SSH_CONFIG.format(names=" ".join(addresses), folder=folder)
    (etc / "ssh/ssh_config").write_text(config)


def own_tmp(folder: Path, keep: Sequence[Path]) -> str:
    """Shell lines that give a host a /tmp of its own, in which what is to `keep` is still seen.

    Hosts do not share /tmp: ranks leave marks there by process ids, which two hosts have alike.
    """
    lines = [f"mount -t tmpfs -o mode=1777 tmp {folder}/tmp"]
    for path in sorted({path.resolve() for path in keep if path.resolve().is_relative_to("/tmp")}):
        inside = f"{folder}/tmp/{path.relative_to('/tmp')}"
        lines.append(f"[ -e {inside} ] || {{ mkdir -p {inside}; mount --bind {path} {inside}; }}")
    return "\n".join([*lines, f"mount --rbind {folder}/tmp /tmp"])


def _make_key(file: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    kind, public = file.with_suffix(".pub").read_text().split()[:2]
    return f"{kind} {public}"


def do(*command: str) -> None:
    """Run a command of the machine; what it says is the error where it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert ended.returncode == 0, f"{' '.join(command)}: {ended.stdout}{ended.stderr}"


def remove(cluster: str) -> None:
    """End all processes of a cluster and remove its names; what is gone already is no error."""
    names = [file.name for file in NAMESPACES.glob(f"{cluster}-*")]
    for name in names:
        end_all(name)
    for name in names:
        do("ip", "netns", "delete", name)
    for etc in ETC.glob(f"{cluster}-*"):
        shutil.rmtree(etc)
    script = ["unshare", "--mount", "sh", "-c", REMOVE_CGROUPS, "sh", "/mnt", cluster]
    subprocess.run(script, check=True, env=ENVIRONMENT)
    shutil.rmtree(STATE / cluster, ignore_errors=True)


def is_made_by(pid: int, file: Path) -> bool:
    """Whether this process is another, alive, and not a later one of the same number."""
    try:
        return pid != os.getpid() and psutil.Process(pid).create_time() <= file.stat().st_mtime
    except psutil.NoSuchProcess:
        return False
    except FileNotFoundError:
        return True  # its cluster is just being made


def end_all(namespace: str) -> None:
    """Kill all that runs in a network namespace, and wait until it is gone."""
    begun = time.monotonic()
    while pids := _living(namespace):
        seconds = time.monotonic() - begun
        assert seconds < GONE_WITHIN_SECONDS, f"{namespace}: processes {pids} outlive SIGKILL"
        # With process 1 of a host all others end, and what started them here fetches their ends;
        # killed at once, it would leave zombies.
        first = [pid for pid in pids if _number_inside(pid) == 1]
        for pid in first if seconds < FIRST_ALONE_SECONDS else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _living(namespace: str) -> list[int]:
    command = ["ip", "netns", "pids", namespace]
    listed = subprocess.run(
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT
    ).stdout
    found = []
    for pid in map(int, listed.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _number_inside(pid: int) -> int:
    """The number that a process has in its own space of process ids; 0: it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0


def check_machine() -> None:
    """Raise UserError, in one line, where this machine cannot hold virtual hosts."""
    if os.geteuid() != 0:
        raise UserError("cluster tests: root rights are missing; run the tests with sudo")
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        names = ", ".join(missing)
        raise UserError(f"cluster tests: {names} missing; run `scripts/setup.sh test`")
    probe = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "sh", "-c", PROBE]
    ended = subprocess.run(probe, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if ended.returncode != 0:
        raise UserError(
            "cluster tests: namespaces or the freezer cgroup (v1) are not allowed here "
            f"({' '.join(ended.stderr.split())[:200]}); run them on a machine of your own, or in a "
            "container with --privileged"
        )
