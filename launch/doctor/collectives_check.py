"""Run the network measurement between ranks of this machine, or of several hosts over ssh."""

import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.doctor.checks import CheckResult
from launch.doctor.network import MARK, SECONDS, measure
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.local_launcher import run_local_ranks
from launch.runtime.ssh import run_on_host
from launch.runtime.world_info import encode_world_info

SLOW_BUS_GB_S = {"nccl": 1.0, "gloo": 0.01}


def measure_here(ranks: int) -> CheckResult:
    """Measure collectives between ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        os.environ["NETWORK_RESULT"] = str(result)
        try:
            run_local_ranks(measure, ranks)
            return _judge("this machine", json.loads(result.read_text()))
        except (UserError, OSError) as error:
            return CheckResult(
                "FAIL",
                "this machine",
                f"no all-reduce between {ranks} ranks: {error}",
                "see NCCL_DEBUG=INFO, and the lines above",
            )
        finally:
            del os.environ["NETWORK_RESULT"]


def measure_between(
    hosts: Mapping[str, int], python: str, port: int, environment: Mapping[str, str]
) -> CheckResult:
    """Measure collectives between ranks of several hosts, started like those of a job."""
    names = list(hosts)
    info = encode_world_info({name: range(slots) for name, slots in hosts.items()})

    def start(number: int) -> str:
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = [
            "env",
            "-C",
            str(ROOT),
            *variables,
            "timeout",
            str(SECONDS + 20),
            python,
            "-m",
            "deepspeed.launcher.launch",
            f"--world_info={info}",
            f"--node_rank={number}",
            f"--master_addr={names[0]}",
            f"--master_port={port}",
            "--log_level",
            "error",
            "launch/doctor/network.py",
        ]
        return run_on_host(names[number], command, timeout=SECONDS + 25)

    where = f"{len(names)} hosts"
    try:
        with ThreadPoolExecutor(max_workers=len(names)) as pool:
            outputs = list(pool.map(start, range(len(names))))
    except UserError as error:
        return CheckResult(
            "FAIL",
            where,
            f"no all-reduce between them: {error}",
            "a firewall? set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        )
    for line in "\n".join(outputs).splitlines():
        if line.startswith(MARK):
            return _judge(where, json.loads(line.removeprefix(MARK)))
    return CheckResult(
        "FAIL", where, "no all-reduce between them: rank 0 has said nothing", "see NCCL_DEBUG=INFO"
    )


def _judge(where: str, found: dict[str, Any]) -> CheckResult:
    text = (
        f"all-reduce between {found['ranks']} ranks by {found['backend']}: {found['latency_us']} us "
        f"for 1 KiB, {found['bus_gb_s']} GB/s bus bandwidth for {found['mib']} MiB"
    )
    if found["bus_gb_s"] < SLOW_BUS_GB_S[found["backend"]]:
        return CheckResult(
            "warn",
            where,
            text,
            "slow: choose a layout that sends little, see recipes/BENCHMARKS.md",
        )
    return CheckResult("ok", where, text)
