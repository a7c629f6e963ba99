"""Turn the facts about a host into check results: ok, warn or FAIL, with the fix."""

from dataclasses import dataclass
from typing import Any, Literal

MIN_SHM_GIB = 1.0
MIN_FREE_GIB = 10.0
MIN_FILES = 4096
UNLIMITED = -1  # resource.RLIM_INFINITY
SLOW_DISK_GB_S = 0.1
SKEW_WARNS_SECONDS, SKEW_FAILS_SECONDS = 2.0, 60.0


@dataclass(frozen=True)
class CheckResult:
    """One result; `remedy` is empty if there is nothing to fix."""

    status: Literal["ok", "warn", "FAIL"]
    where: str
    what: str
    remedy: str = ""


def check_host(facts: dict[str, Any], several: bool, port: int | None) -> list[CheckResult]:
    """Check one host's facts from the probe; `several`: it will train together with other hosts."""
    host = facts["hostname"]
    lines: list[CheckResult] = []

    def line(good: bool, what: str, remedy: str, status: Literal["warn", "FAIL"] = "FAIL") -> None:
        lines.append(
            CheckResult("ok", host, what) if good else CheckResult(status, host, what, remedy)
        )

    python = facts["python"]
    supported = tuple(int(part) for part in python["version"].split(".")[:2]) >= (3, 11)
    line(supported, f"Python {python['version']} at {python['executable']}", "use 3.11 or newer")
    if not facts["checkout"]:
        line(
            False, "no checkout here", "put it at the same path on every host, or on a shared disk"
        )
    missing = [name for name, (_, there) in facts["versions"].items() if there is None]
    other = [
        f"{name} {there} instead of {wanted}"
        for name, (wanted, there) in facts["versions"].items()
        # suffixes such as "+cpu" are build variants
        if there is not None and there.partition("+")[0] != wanted
    ]
    shown = ", ".join(
        f"{name} {facts['versions'][name][1]}"
        for name in ("torch", "deepspeed", "transformers")
        if name in facts["versions"]
    )
    line(
        not missing,
        f"packages: {shown}" if not missing else f"missing: {', '.join(missing)}",
        "run: make setup",
    )
    if other:
        line(
            False,
            f"other versions: {', '.join(other)}",
            "run: make setup, for those tested",
            "warn",
        )
    gpus = facts["gpus"]
    if gpus:
        named = {gpu.get("name", "?") for gpu in gpus}
        text = (
            f"{len(gpus)} x {' and '.join(sorted(named))}, driver {gpus[0].get('driver_version')}"
        )
        line(
            len(named) == 1, text, "mixed GPUs run at the slowest's speed; ask for one kind", "warn"
        )
    else:
        lines.append(
            CheckResult("ok", host, f"no GPU: trains on {facts['cores']} CPU cores with gloo")
        )
    lines.append(
        CheckResult("ok", host, f"{facts['free_memory_gib']} GiB of memory free, {facts['libc']}")
    )
    programs = facts["programs"]
    line(
        bool(programs["c++"]),
        f"C++ compiler {programs['c++'] or 'missing'}",
        "offload recipes compile; run: apt-get install g++",
        "warn",
    )
    line(
        bool(programs["ninja"]),
        "ninja" if programs["ninja"] else "ninja missing",
        "run: make setup, and start from its environment",
        "warn",
    )
    line(
        facts["python_h"],
        f"Python.h {'there' if facts['python_h'] else 'missing'}",
        "offload recipes compile; run: apt-get install python3-dev",
        "warn",
    )
    line(
        facts["libaio"],
        f"libaio.h {'there' if facts['libaio'] else 'missing'}",
        "NVMe recipes need it; run: apt-get install libaio-dev",
        "warn",
    )
    if gpus:
        line(
            bool(programs["nvcc"]),
            f"nvcc {programs['nvcc'] or 'missing'}",
            "only DeepSpeed's fused optimizers need it; install the CUDA toolkit",
            "warn",
        )
    shm = facts["shm_gib"]
    line(
        shm is not None and shm >= MIN_SHM_GIB,
        f"/dev/shm {shm} GiB",
        "NCCL needs more; containers: --shm-size=16g, Kubernetes: a Memory emptyDir",
        "warn",
    )
    line(
        facts["nofile"] >= MIN_FILES,
        f"open files: {facts['nofile']}",
        f"many ranks need more; run: ulimit -n {16 * MIN_FILES}",
        "warn",
    )
    if gpus and several:
        line(
            facts["memlock"] == UNLIMITED,
            "locked memory",
            "InfiniBand needs it; run: ulimit -l unlimited",
            "warn",
        )
    lines += _check_network(facts, several, port)
    lines += _check_disk(facts)
    return lines


def _check_network(facts: dict[str, Any], several: bool, port: int | None) -> list[CheckResult]:
    host, lines = facts["hostname"], []
    addresses = facts["addresses"]
    loopback = [address for address in addresses if address.startswith("127.")]
    if not addresses:
        lines.append(
            CheckResult(
                "FAIL",
                host,
                "its own name resolves to nothing",
                f"add a line to /etc/hosts: <its address> {host}",
            )
        )
    elif several and loopback:
        lines.append(
            CheckResult(
                "FAIL",
                host,
                f"its own name resolves to {loopback[0]}, which gloo would tell the other hosts",
                f"in /etc/hosts, give {host} its real address (Debian writes "
                f"127.0.1.1 {host}), or set interface: in the site file",
            )
        )
    else:
        lines.append(CheckResult("ok", host, f"its name resolves to {addresses[0]}"))
    carried = {name: ip for name, ip in facts["interfaces"].items() if not ip.startswith("127.")}
    shown = ", ".join(f"{name} {ip}" for name, ip in carried.items()) or "none"
    if several and not carried:
        lines.append(CheckResult("FAIL", host, "no network interface", "bring one up: ip link"))
    else:
        lines.append(CheckResult("ok", host, f"interfaces: {shown}"))
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        chosen = facts["variables"].get(variable)
        if chosen and not any(name.startswith(chosen.lstrip("=^")) for name in facts["interfaces"]):
            lines.append(
                CheckResult(
                    "FAIL",
                    host,
                    f"{variable} is {chosen}, and there is no such interface",
                    f"choose from: {', '.join(facts['interfaces'])}",
                )
            )
    if facts["port_free"] is not None:
        lines.append(
            CheckResult("ok", host, f"port {port} is free")
            if facts["port_free"]
            else CheckResult(
                "FAIL", host, f"port {port} is in use", "choose another one: --master_port N"
            )
        )
    return lines


def _check_disk(facts: dict[str, Any]) -> list[CheckResult]:
    host, disk = facts["hostname"], facts["disk"]
    if disk is None:
        return []
    if "error" in disk:
        return [
            CheckResult(
                "FAIL",
                host,
                f"runs folder: {disk['error']}",
                "name one that can be written: --folder",
            )
        ]
    text = (
        f"runs folder: {disk['free_gib']} GiB free, writes {disk['write_gb_s']} GB/s, reads "
        f"{disk['read_gb_s']} GB/s"
    )
    if disk["free_gib"] < MIN_FREE_GIB:
        return [
            CheckResult(
                "warn", host, text, "a checkpoint takes 14 bytes per parameter or more; make room"
            )
        ]
    if disk["write_gb_s"] < SLOW_DISK_GB_S:
        return [CheckResult("warn", host, text, "checkpoints will take long; take a faster disk")]
    return [CheckResult("ok", host, text)]


def check_together(found: list[dict[str, Any]], skews: list[float]) -> list[CheckResult]:
    """Compare hosts with the first one; `skews` are their clock offsets from ours in seconds."""
    first, lines = found[0], []
    for facts, skew in zip(found, skews, strict=True):
        host = facts["hostname"]
        if facts["python"]["version"] != first["python"]["version"]:
            lines.append(
                CheckResult(
                    "FAIL",
                    host,
                    f"Python {facts['python']['version']}, and "
                    f"{first['python']['version']} on {first['hostname']}",
                    "use the same one on every host",
                )
            )
        if facts["commit"] != first["commit"]:
            lines.append(
                CheckResult(
                    "FAIL",
                    host,
                    f"checkout at {facts['commit']}, and at {first['commit']} on "
                    f"{first['hostname']}",
                    "bring them to the same commit",
                )
            )
        if facts["token_visible"] is False:
            lines.append(
                CheckResult(
                    "FAIL",
                    host,
                    "does not see the runs folder of this machine",
                    "put it on a disk that every host shares, at the same path",
                )
            )
        if len(facts["gpus"]) != len(first["gpus"]):
            lines.append(
                CheckResult(
                    "warn",
                    host,
                    f"{len(facts['gpus'])} GPUs, and {len(first['gpus'])} on {first['hostname']}",
                    "give the hostfile's slots to match",
                )
            )
        text = f"clock {skew:+.1f} s"
        if abs(skew) > SKEW_WARNS_SECONDS:
            status: Literal["warn", "FAIL"] = "FAIL" if abs(skew) > SKEW_FAILS_SECONDS else "warn"
            lines.append(CheckResult(status, host, text, "run: timedatectl set-ntp true"))
        else:
            lines.append(CheckResult("ok", host, text))
    return lines
