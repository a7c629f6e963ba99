"""Parts of job submission that need no cluster."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import kill_job
from launch.cluster.backends.slurm import world_info_of_node
from launch.cluster.backends.ssh import escaped
from launch.cluster.job_store import Record
from launch.cluster.monitor import errors
from launch.errors import UserError


def devices(nodes: int, gpus: int, visible: str | None) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = json.loads(
        base64.urlsafe_b64decode(world_info_of_node(nodes, gpus, visible))
    )
    return found


def test_a_node_s_ranks_get_the_gpus_that_slurm_gave() -> None:
    assert devices(2, 2, "4,5") == {"node0": [4, 5], "node1": [4, 5]}
    assert devices(1, 2, "GPU-aa,MIG-bb") == {"node0": ["GPU-aa", "MIG-bb"]}
    assert devices(1, 2, None) == devices(1, 2, "") == {"node0": [0, 1]}


def test_another_number_of_gpus_than_asked_for_is_rejected() -> None:
    with pytest.raises(UserError, match="gave the job GPUs 4,5,6 on this node, and it wants 2"):
        world_info_of_node(2, 2, "4,5,6")


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
        assert sorted(kill_job.processes_of(str(own))) == sorted([mine.pid, mpirun.pid])
        for process in (mine, mpirun):
            process.terminate()
            process.wait(timeout=100)
        assert kill_job.end(str(own)) == 0
        assert neighbour.poll() is None
        assert reader.poll() is None
    finally:
        for process in (mine, mpirun, neighbour, reader):
            process.kill()
            process.wait()


def test_the_cause_of_a_failure_is_told_and_what_followed_from_it_only_where_no_cause_is(
    tmp_path: Path,
) -> None:
    record = Record("1", "slurm", "x", 1, str(tmp_path), str(tmp_path / "job"))
    logs = tmp_path / "job/logs"
    logs.mkdir(parents=True)
    earlier = logs / "earlier_rank0.log"
    earlier.write_text("error: what an earlier job of the run has told\n")
    os.utime(earlier, (0, 0))
    (tmp_path / "job/x.yaml").touch()
    (tmp_path / "job/slurm-1.log").write_text(
        "0: error: [rank 2] ended by SIGTERM: another rank died, or somebody stopped the job; x\n"
        "error: the ranks ended with exit code 2; their logs: here\n"
    )
    assert len(errors(record)) == 2
    for rank in (0, 3):
        place = f"[rank {rank}] " if rank else ""
        (logs / f"t_rank{rank}.log").write_text(f"step 1\nerror: {place}step 2: loss is nan\n")
    lost = "error: [rank 1] the connection to another rank is lost: that rank was killed\n"
    (logs / "t_rank1.log").write_text(lost)
    assert errors(record) == ["step 2: loss is nan"]
