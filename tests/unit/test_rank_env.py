"""A process finds its rank in the variables of whatever started it, or says that it cannot."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from launch.errors import UserError
from launch.runtime.rank_env import set_rank_env_from_launcher

MEET = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
FOUND = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1",
}  # fmt: skip
LAUNCHERS = {
    "openmpi": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "mvapich": {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "8",
                "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"},
    "mpich": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "cray": {"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"},
    "jsrun": {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "8",
              "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "2"},
    "srun": SRUN,
    # Its proxies, one a node, are tasks of a step; what they start inherits these.
    "mpich on slurm": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1",
                       "MPI_LOCALNRANKS": "2", **SRUN, "SLURM_PROCID": "2",
                       "SLURM_STEP_NUM_TASKS": "4"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What the code under test adds to the environment is gone afterwards."""
    with mock.patch.dict(os.environ):
        yield


def environment(variables: dict[str, str]) -> None:
    """These variables and PATH, for this test."""
    path = os.environ["PATH"]
    os.environ.clear()
    os.environ |= {"PATH": path, **variables}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_a_launcher(launcher: str) -> None:
    environment(LAUNCHERS[launcher] | MEET)
    set_rank_env_from_launcher()
    assert {name: os.environ[name] for name in FOUND} == FOUND


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "jsrun"])
def test_a_launcher_that_does_not_say_where_the_ranks_meet(
    launcher: str,
) -> None:
    environment(LAUNCHERS[launcher])
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not set"):
        set_rank_env_from_launcher()


def test_slurm_says_where_they_meet(tmp_path: Path) -> None:
    environment(SRUN | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    with pytest.raises(UserError, match=r"which hosts n\[1-3\] are"):
        set_rank_env_from_launcher()
    environment(SRUN)
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    fake.chmod(0o755)
    set_rank_env_from_launcher()
    assert os.environ["MASTER_ADDR"] == "n1"
    assert os.environ["MASTER_PORT"] == str(20_000 + 7 * 16 + 1)


NONE: list[dict[str, str]] = [
    {},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # a batch script
    SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    {"PMI_RANK": "0", "PMI_SIZE": "1"},
]


@pytest.mark.parametrize("variables", NONE)
def test_one_process_is_a_run_of_its_own(
    variables: dict[str, str],
) -> None:
    environment(variables)
    set_rank_env_from_launcher()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("name", ["PMI_SIZE", "PMIX_SIZE", "FLUX_JOB_SIZE"])
def test_several_processes_of_an_unknown_launcher_are_refused(
    name: str,
) -> None:
    environment({name: "4"})
    with pytest.raises(UserError, match=f"{name} is 4, and no variable tells which"):
        set_rank_env_from_launcher()
    os.environ["RANK"] = "0"  # torchrun's, inside
    set_rank_env_from_launcher()
