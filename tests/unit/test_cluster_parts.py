"""Parts of job submission that need no cluster."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import end_on_host
from launch.cluster.slurm import world_info
from launch.cluster.ssh_hosts import escaped
from launch.errors import UserError


def devices(nodes: int, gpus: int, visible: str | None) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = json.loads(
        base64.urlsafe_b64decode(world_info(nodes, gpus, visible))
    )
    return found


def test_a_node_s_ranks_get_the_gpus_that_slurm_gave() -> None:
    assert devices(2, 2, "4,5") == {"node0": [4, 5], "node1": [4, 5]}
    assert devices(1, 2, "GPU-aa,MIG-bb") == {"node0": ["GPU-aa", "MIG-bb"]}
    assert devices(1, 2, None) == devices(1, 2, "") == {"node0": [0, 1]}


def test_another_number_of_gpus_than_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="gave the job GPUs 4,5,6 on this node, and it wants 2"):
        world_info(2, 2, "4,5,6")


@pytest.mark.parametrize(
    "value",
    ["plain-1.2/x", "", " a b ", "it's", '"q"', "$HOME `id` $(id)", "a\\b\\", "!x;&|<>*?~#"],
)
def test_a_variable_survives_what_deepspeed_and_the_shell_do(value: str) -> None:

    written = escaped("NAME", value).replace("%%", "%").strip()  # pdsh; and DeepSpeed strips
    if re.search(r"[^\w@%+=:,./-]", written):  # deepspeed.launcher.multinode_runner.add_export
        written = f'"{written}"'
    done = subprocess.run(
        ["sh", "-c", f'export NAME={written}; printf %s "$NAME"'],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"], "HOME": "/h"},
    )  # fmt: skip
    assert done.stdout == value


def test_only_the_job_s_own_processes_are_ended(tmp_path: Path) -> None:
    """Another job of the same recipe, and a person who looks into the folder, go on."""
    sleep = "import time; time.sleep(100)"
    own, other = tmp_path / "a/job", tmp_path / "ab/job"
    command = [sys.executable, "-c", sleep]
    mine = subprocess.Popen([*command, "launch/train.py", "--config", f"{own}/x.yaml"])
    mpirun = subprocess.Popen([*command, "--hostfile", f"{own}/hostfile", "bash", f"{own}/node.sh"])
    neighbour = subprocess.Popen([*command, "launch/train.py", "--config", f"{other}/x.yaml"])
    reader = subprocess.Popen([*command, f"{own}/logs/x.log", f"{own}/node.sh"])
    try:
        assert sorted(end_on_host.processes_of(str(own))) == sorted([mine.pid, mpirun.pid])
        for process in (mine, mpirun):
            process.terminate()
            process.wait(timeout=10)
        assert end_on_host.end(str(own)) == 0
        assert neighbour.poll() is None
        assert reader.poll() is None
    finally:
        for process in (mine, mpirun, neighbour, reader):
            process.kill()
            process.wait()
