"""Collect facts about this host and print them as one JSON object.

Needs only Python, so that it can report missing packages:

    python3 launch/doctor/probe.py '{"checkout": "/path", "token": null, "port": 29500, "folder": null}'

`token` is a file written by another host, to check that a folder is shared.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915
GIB = 2**30
DISK_TEST_BYTES = 64 * 2**20


def gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each GPU; empty without nvidia-smi."""
    fields = ("name", "memory.total", "memory.free", "driver_version")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=15, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(fields, line, strict=False)) for line in lines]


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(
                    probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def addresses_of_own_name() -> list[str]:
    """The addresses of this host's own name, to which ranks on other hosts connect."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(entry[4][0]) for entry in found})


def port_free(port: int) -> bool:
    """Whether rank 0 could listen here."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def disk(folder: Path) -> dict[str, Any]:
    """Free space of a folder in GiB, and its write and read speed for 64 MiB in GB/s."""
    file = folder / f".disk-speed-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(2**20)
    try:
        free = shutil.disk_usage(folder).free / GIB
        started = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(DISK_TEST_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        written = time.perf_counter()
        with file.open("rb") as back:
            os.posix_fadvise(back.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while back.read(2**20):
                pass
        read = time.perf_counter()
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        file.unlink(missing_ok=True)
    return {
        "free_gib": round(free, 1),
        "write_gb_s": round(DISK_TEST_BYTES / (written - started) / 1e9, 2),
        "read_gb_s": round(DISK_TEST_BYTES / (read - written) / 1e9, 2),
    }


def versions(checkout: Path) -> dict[str, list[str | None]]:
    """The required and the installed version of each package pinned in requirements.txt."""
    found: dict[str, list[str | None]] = {}
    with contextlib.suppress(OSError):
        for line in (checkout / "requirements.txt").read_text().splitlines():
            pin = re.match(r"([A-Za-z0-9_.-]+)==([^\s#]+)", line)
            if pin:
                there = None
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    there = importlib.metadata.version(pin.group(1))
                found[pin.group(1)] = [pin.group(2), there]
    return found


def commit(checkout: Path) -> str | None:
    """The checkout's commit, or None if git cannot tell."""
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=15, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def facts(asked: dict[str, Any]) -> dict[str, Any]:
    """Collect all facts about this host that the checks need."""
    checkout = Path(asked["checkout"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / GIB
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return {
        "clock": time.time(),
        "hostname": socket.gethostname(),
        "python": {"executable": sys.executable, "version": platform.python_version()},
        "libc": " ".join(platform.libc_ver()),
        "versions": versions(checkout),
        "checkout": (checkout / "launch/train.py").is_file(),
        "commit": commit(checkout),
        "token_visible": None if asked.get("token") is None else Path(asked["token"]).is_file(),
        "port_free": None if asked.get("port") is None else port_free(int(asked["port"])),
        "disk": None if asked.get("folder") is None else disk(Path(asked["folder"])),
        "addresses": addresses_of_own_name(),
        "interfaces": interfaces(),
        "gpus": gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "free_memory_gib": round(memory, 1),
        "shm_gib": None if shm is None else round(shm.total / GIB, 2),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "programs": {name: shutil.which(name) for name in ("c++", "ninja", "nvcc", "pdsh", "mpirun")},
        "python_h": headers.is_file(),
        "libaio": any(Path(root, "libaio.h").is_file() for root in ("/usr/include", "/usr/local/include")),
        "variables": {
            name: os.environ[name]
            for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
    }  # fmt: skip


if __name__ == "__main__":
    # As under the launchers, the interpreter's bin folder comes first.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    print(json.dumps(facts(json.loads(sys.argv[1]))))
