"""scripts/doctor.py across two hosts: health, what is wrong with one of them, and the network."""

import json
import re
import sys
from typing import Any

import pytest

from launch.ops.builder import use_private_cache
from launch.paths import ROOT
from tests.cluster.jobs import unknown_key
from tests.cluster.virtual import Cluster


def doctor(cluster: Cluster, *hosts: str) -> tuple[int, list[dict[str, Any]]]:
    hostfile = cluster.folder / "doctor-hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts or cluster.hosts))
    done = cluster.run(
        [sys.executable, ROOT / "scripts/doctor.py", "--hostfile", hostfile, "--json",
         "--folder", cluster.folder / "doctor", "--port", "23459"]
    )  # fmt: skip
    return done.code, json.loads(done.output[done.output.index("[\n") :])


def failing(lines: list[dict[str, Any]]) -> list[str]:
    return [f"{line['where']}: {line['what']}" for line in lines if line["status"] == "FAIL"]


def bandwidth(lines: list[dict[str, Any]]) -> float:
    found = re.search(r"([\d.]+) GB/s bus", " ".join(line["what"] for line in lines))
    assert found, lines
    return float(found.group(1))


def test_two_healthy_hosts_and_the_link_between_them(cluster: Cluster) -> None:
    code, lines = doctor(cluster)
    assert code == 0, failing(lines)
    told = [f"{line['where']}: {line['what']}" for line in lines]
    for host in cluster.hosts:
        assert any(line.startswith(f"{host}: clock ") for line in told)
        assert any(line.startswith(f"{host}: its name resolves to 10.77.0.") for line in told)
        assert any(line.startswith(f"{host}: torch 2.") for line in told)
        assert any(line.startswith(f"{host}: JIT cache ") for line in told)
    assert bandwidth(lines) > 0


@pytest.mark.matrix  # of what it says, one number
def test_a_slow_link_is_measured(cluster: Cluster) -> None:
    fast = bandwidth(doctor(cluster)[1])
    with cluster.limit("200mbit"):
        _, lines = doctor(cluster)
    # 200 Mbit/s are 0.025 GB/s; the token bucket lets a little more through at first.
    slow = bandwidth(lines)
    assert slow < 0.05 and slow < fast


def test_hosts_that_cannot_take_part_are_failing_lines(cluster: Cluster) -> None:
    first, second = cluster.hosts
    hosts_file = cluster.folder / "hosts-with-loopback"
    hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {first}\n10.77.0.2 {second}\n")
    loopback = cluster.replace(first, "/etc/hosts", hosts_file)
    with loopback, cluster.hide(second, ROOT / "launch"):
        code, lines = doctor(cluster, first, "nowhere", "10.77.0.99", second)
    assert code == 1
    found = failing(lines)
    assert any(line.startswith("nowhere: nobody knows this name") for line in found)
    assert any(line.startswith("10.77.0.99: ") for line in found)
    assert f"{second}: no checkout here" in found
    assert any(line.startswith(first) and "resolves to 127.0.1.1" in line for line in found)
    assert all(line["remedy"] for line in lines if line["status"] != "ok")


def test_an_unknown_key_of_one_host_and_a_killed_build_s_lock_on_another(cluster: Cluster) -> None:
    first, second = cluster.hosts
    cache, planted = use_private_cache(), cluster.folder / "cache-with-lock"
    lock = "cpu_adam/lock"
    (planted / lock).parent.mkdir(parents=True)
    (planted / lock).touch()
    cache.mkdir(parents=True, exist_ok=True)
    with cluster.replace(first, cache, planted), unknown_key(cluster, second):
        code, lines = doctor(cluster)
    assert code == 1
    assert f"{second}: its host key is unknown" in failing(lines)
    (line,) = [line for line in lines if line["where"] == second]
    assert f"ssh-keyscan {second}" in line["remedy"]
    (line,) = [line for line in lines if line["where"] == first and line["status"] == "FAIL"]
    assert f"{cache}/{lock} is left from a build that was killed" in line["what"]
    assert line["remedy"].startswith(f"run: rm {cache}/{lock}")
