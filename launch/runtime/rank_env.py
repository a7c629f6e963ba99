"""Each rank's number and meeting place, from the variables of whatever started it."""

import os
import re
import subprocess
from typing import NamedTuple

from launch.errors import UserError


class _Launcher(NamedTuple):
    """The variables in which a launcher tells a process its place; `local_size` may be unknown."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str | None


# The first whose variables are all set; an mpirun on Slurm is itself started by srun.
LAUNCHERS = (
    _Launcher("OpenMPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
              "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("MVAPICH's mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
              "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("MPICH's or Intel's mpirun", "PMI_RANK", "PMI_SIZE",
              "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("Cray's aprun or PALS", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Launcher("IBM's jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE",
              "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    # The variables of a step: those of a job are set in its batch script too, which is one process.
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
)  # fmt: skip
# Sizes that say that there are other processes, if none of the above told our place among them.
SIZES = ("PMI_SIZE", "PMIX_SIZE", "PALS_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS")


def set_rank_env_from_launcher() -> None:
    """Under mpirun, srun and the like, set RANK etc. from their variables; else all would be rank 0.

    `deepspeed`, `torchrun` and `accelerate launch` set them themselves. Without a launcher, nothing
    is set.

    Raises:
        UserError: if the host and port of the rendezvous are not known, or if a launcher that is
            not in `LAUNCHERS` has started several processes.
    """
    if "RANK" in os.environ:
        return
    launcher = _started_by()
    if launcher is None:
        several = [name for name in SIZES if os.environ.get(name, "1") not in ("", "1")]
        if several:
            raise UserError(
                f"{several[0]} is {os.environ[several[0]]}, and no variable tells which of these "
                "processes this is; start them with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, "
                "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            )
        return
    size = _tasks_on_this_node() if launcher.local_size is None else os.environ[launcher.local_size]
    os.environ |= {
        "RANK": os.environ[launcher.rank],
        "WORLD_SIZE": os.environ[launcher.world_size],
        "LOCAL_RANK": os.environ[launcher.local_rank],
        "LOCAL_WORLD_SIZE": size,
    }
    if "SLURM_STEP_NODELIST" in os.environ:
        _meet_on_slurm()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set: {launcher.name} does not say where the ranks meet; "
            "add -x MASTER_ADDR=<first host> -x MASTER_PORT=29500 (OpenMPI; -genv NAME VALUE for "
            "others), or use scripts/submit.py"
        )


def _started_by() -> _Launcher | None:
    for launcher in LAUNCHERS:
        names = [name for name in launcher[1:] if name is not None]
        if all(name in os.environ for name in names) and os.environ[launcher.world_size] != "1":
            return launcher
    return None


def _tasks_on_this_node() -> str:
    """Slurm has it as a list over the nodes: `2(x3),1` is 2, 2, 2, 1."""
    tasks: list[str] = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert found is not None, part
        tasks += [found[1]] * int(found[2] or 1)
    return tasks[int(os.environ["SLURM_NODEID"])]


def _meet_on_slurm() -> None:
    """On the step's first node, at a port that jobs and steps at the same time do not share."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
            ).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"MASTER_ADDR not set, and scontrol does not say which hosts {nodes} are ({error}); "
                "export MASTER_ADDR=<first host>"
            ) from None
        os.environ["MASTER_ADDR"] = listed[0]
    step = int(os.environ.get("SLURM_JOB_ID", "0")) * 16 + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20_000 + step % 12_000))
