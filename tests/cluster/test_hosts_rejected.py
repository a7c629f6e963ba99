"""Hosts that cannot run a job are told before anything is submitted, each in one line."""

import os
import signal
import sys
from typing import Any

import pytest

from launch.cluster.backends.ssh import escaped
from launch.errors import UserError
from launch.paths import ROOT
from tests.cluster.jobs import LAUNCHERS, hosts, recipe, try_submit, unknown_key
from tests.cluster.virtual import Cluster


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_host_that_is_off_is_told(cluster: Cluster, kind: str) -> None:
    place = hosts(cluster, "off", hosts={"hosts": [cluster.hosts[0], "10.77.0.99"]})
    ended = try_submit(cluster, kind, recipe(cluster, "off"), place)
    assert ended.code == 2
    assert "host 10.77.0.99: " in ended.error()


def test_hosts_that_cannot_run_the_job_are_told(cluster: Cluster) -> None:
    first, second = cluster.hosts
    file = recipe(cluster, "bad")

    def error(**changes: Any) -> str:
        ended = try_submit(cluster, "ssh", file, hosts(cluster, "bad", **changes))
        assert ended.code == 2, ended.output
        return ended.error()

    assert "host nowhere: nobody knows this name" in error(hosts={"hosts": [first, "nowhere"]})
    assert "name its hosts in the site file" in error(hosts={})
    assert "there are 1 hosts, and --nodes asks for 2" in error(hosts={"hosts": [first]})
    assert "there is no interface wlan7; choose from: " in error(interface="wlan7")
    hostfile = cluster.folder / "bad-hostfile"
    hostfile.write_text(f"{first} slots=2\n{second}\n")
    assert f"{hostfile}:2: '{second}' is no host" in error(hosts={"hostfile": str(hostfile)})
    hostfile.write_text(f"{first} slots=2\n{second} slots=1\n")
    assert f"{second} has 1 slots" in error(hosts={"hostfile": str(hostfile)})
    assert "cannot read the hostfile" in error(hosts={"hostfile": "/nowhere"})
    assert f"host {first}: there is no /nowhere/python" in error(python="/nowhere/python")
    with unknown_key(cluster, second):
        assert f"host {second}: its host key is unknown; run: ssh-keyscan {second}" in error()
    (cluster.folder / "runs").mkdir(exist_ok=True)
    with cluster.hide(second, cluster.folder / "runs"):
        assert f"host {second}: does not see {cluster.folder}/runs" in error()
    with cluster.hide(second, ROOT / "launch"):
        assert f"host {second}: there is no checkout at {ROOT}" in error()


def test_another_python_on_a_host_is_told(cluster: Cluster) -> None:
    python = cluster.folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other = cluster.folder / "other-python"
    other.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import platform, sys; "
        'platform.python_version = lambda: "3.9.2"; sys.argv.pop(0); exec(sys.stdin.read())\' "$@"\n'
    )
    for file in (python, other):
        file.chmod(0o755)
    second = cluster.hosts[1]
    with cluster.replace(second, python, other):
        ended = try_submit(
            cluster, "ssh", recipe(cluster, "python"), hosts(cluster, "py", python=str(python))
        )
    assert ended.code == 2
    assert f"host {second}: Python 3.9.2 at {python}, and 3.11" in ended.error()


def test_a_port_in_use_is_told(cluster: Cluster) -> None:
    listen = "import socket, time; s = socket.create_server(('', 23457)); time.sleep(600)"
    other = cluster.start(["python3", "-c", listen], cluster.hosts[0])
    try:
        ended = try_submit(cluster, "ssh", recipe(cluster, "port"), hosts(cluster, "p", port=23457))
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait(timeout=100)
    assert ended.code == 2
    assert f"host {cluster.hosts[0]}: port 23457 is in use" in ended.error()


def test_a_host_without_mpirun_is_told(cluster: Cluster) -> None:
    mpirun = cluster.run(["which", "mpirun"]).output.strip()
    plain = cluster.folder / "not-executable"
    plain.touch()
    second = cluster.hosts[1]
    with cluster.replace(second, mpirun, plain):
        ended = try_submit(cluster, "openmpi", recipe(cluster, "mpi"), hosts(cluster))
    assert ended.code == 2
    assert f"host {second}: there is no mpirun; run there: apt-get install" in ended.error()


@pytest.mark.parametrize("value", ["one\ntwo", "one\rtwo", "one\n"])
def test_a_value_that_deepspeed_cannot_hand_over_is_rejected(value: str) -> None:
    with pytest.raises(UserError, match=r"environment\.NOTE: a value of several lines"):
        escaped("NOTE", value)
