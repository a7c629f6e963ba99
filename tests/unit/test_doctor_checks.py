"""Each thing that a host can lack is found in its facts, and told with a remedy."""

import copy
import json
from typing import Any

import pytest

from launch.doctor import probe
from launch.doctor.checks import CheckResult, check_host, check_together
from launch.doctor.remote_probe import question
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.ssh import read_hostfile

HEALTHY: dict[str, Any] = {
    "clock": 0.0,
    "hostname": "host1",
    "python": {"executable": "/v/bin/python", "version": "3.11.7"},
    "libc": "glibc 2.36",
    "versions": {"torch": ["2.13.0", "2.13.0+cpu"], "deepspeed": ["0.19.8", "0.19.8"]},
    "checkout": True,
    "commit": "abc",
    "token_visible": True,
    "port_free": True,
    "disk": {"free_gib": 100.0, "write_gb_s": 1.0, "read_gb_s": 2.0},
    "addresses": ["10.0.0.1"],
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    "gpus": [{"name": "H100", "driver_version": "580"}] * 2,
    "cores": 8,
    "free_memory_gib": 100.0,
    "shm_gib": 16.0,
    "nofile": 65536,
    "memlock": -1,
    "programs": {"c++": "/usr/bin/c++", "ninja": "/v/ninja", "nvcc": "/usr/bin/nvcc"},
    "python_h": True,
    "libaio": True,
    "variables": {"NCCL_SOCKET_IFNAME": "eth"},
}


def judged(**changes: Any) -> list[CheckResult]:
    return check_host({**copy.deepcopy(HEALTHY), **changes}, several=True, port=29500)


def bad(lines: list[CheckResult]) -> list[CheckResult]:
    return [line for line in lines if line.status != "ok"]


def test_nothing_is_wrong_with_a_healthy_host() -> None:
    assert bad(judged()) == []
    assert bad(check_together([HEALTHY, HEALTHY], [0.1, -0.2])) == []


PLANTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "old Python": ({"python": {"executable": "p", "version": "3.9.2"}}, "FAIL", "Python 3.9.2"),
    "no checkout": ({"checkout": False}, "FAIL", "no checkout"),
    "no deepspeed": ({"versions": {"deepspeed": ["0.19.8", None]}}, "FAIL", "missing: deepspeed"),
    "other torch": ({"versions": {"torch": ["2.13.0", "2.9.1"]}}, "warn", "torch 2.9.1 instead"),
    "mixed GPUs": ({"gpus": [{"name": "H100"}, {"name": "A100"}]}, "warn", "A100 and H100"),
    "no compiler": ({"programs": {"c++": None, "ninja": "n", "nvcc": "n"}}, "warn", "C++ compiler"),
    "no headers": ({"python_h": False}, "warn", "Python.h missing"),
    "no libaio": ({"libaio": False}, "warn", "libaio.h missing"),
    "small shm": ({"shm_gib": 0.06}, "warn", "/dev/shm 0.06 GiB"),
    "few files": ({"nofile": 1024}, "warn", "open files: 1024"),
    "little locked memory": ({"memlock": 65536}, "warn", "locked memory"),
    "no name": ({"addresses": []}, "FAIL", "resolves to nothing"),
    "loopback": ({"addresses": ["127.0.1.1"]}, "FAIL", "resolves to 127.0.1.1"),
    "no network": ({"interfaces": {"lo": "127.0.0.1"}, "variables": {}}, "FAIL", "no network"),
    "bad interface": ({"variables": {"GLOO_SOCKET_IFNAME": "wlan7"}}, "FAIL", "is wlan7"),
    "port": ({"port_free": False}, "FAIL", "port 29500 is in use"),
    "no disk": ({"disk": {"error": "Read-only file system"}}, "FAIL", "Read-only file system"),
    "full disk": ({"disk": {**HEALTHY["disk"], "free_gib": 1.0}}, "warn", "1.0 GiB free"),
    "slow disk": ({"disk": {**HEALTHY["disk"], "write_gb_s": 0.01}}, "warn", "writes 0.01 GB/s"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_told_with_a_remedy(name: str) -> None:
    changes, status, words = PLANTED[name]
    (line,) = bad(judged(**changes))
    assert line.status == status
    assert words in line.what
    assert line.remedy


@pytest.mark.parametrize(
    ("changes", "skew", "words"),
    [
        ({"commit": "def"}, 0.0, "checkout at def, and at abc on host1"),
        ({"python": {"version": "3.12.1"}}, 0.0, "Python 3.12.1, and 3.11.7 on host1"),
        ({"token_visible": False}, 0.0, "does not see the runs folder"),
        ({"gpus": []}, 0.0, "0 GPUs, and 2 on host1"),
        ({}, 5.0, "clock +5.0 s"),
        ({}, -300.0, "clock -300.0 s"),
    ],
)
def test_hosts_that_differ_are_told(changes: dict[str, Any], skew: float, words: str) -> None:
    other = {**HEALTHY, "hostname": "host2", **changes}
    (line,) = bad(check_together([HEALTHY, other], [0.0, skew]))
    assert (line.where, line.status != "ok") == ("host2", True)
    assert words in line.what
    assert line.remedy


def test_the_probe_tells_all_that_the_checks_read() -> None:
    facts = probe.facts(json.loads(question(ROOT)))
    assert set(facts) == set(HEALTHY)
    assert facts["checkout"]
    assert facts["versions"]["deepspeed"] == ["0.19.8", "0.19.8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a slots=2\nb\n", ":2: 'b' is no host"), ("a slots=0\n", ":1: "), ("# none\n", "no host in it"),
     ("a slots=1\na slots=1\n", ":2: a is there twice")],
)  # fmt: skip
def test_a_bad_hostfile_is_told_with_its_line(text: str, words: str, tmp_path: Any) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(file)
    file.write_text("# comment\na slots=2\n\nb slots=4  # more\n")
    assert read_hostfile(file) == {"a": 2, "b": 4}
