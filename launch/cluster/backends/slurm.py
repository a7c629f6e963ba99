"""Slurm: one batch job with one task per node, which runs DeepSpeed's per-node launcher.

As a program on a node, it prints the node's `--world_info`: see `world_info_of_node`.
"""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.checkpoint.manifest import STATE_BYTES
from launch.cluster.job import Job
from launch.cluster.job_store import Record, State
from launch.errors import UserError
from launch.planner.model_size import model_size
from launch.runtime.failures import one_line_errors
from launch.runtime.world_info import encode_world_info

ASK_SECONDS = 60
GONE_WITHIN_SECONDS = 120.0
SPARE_SECONDS = 60  # for the step at hand, and for Slurm to look
PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
# Messages of Slurm's commands if there is no cluster, and the fix.
NO_CLUSTER = {
    "Could not establish a configuration source": "this machine belongs to no Slurm cluster; submit from a "
    "login node, or name its slurm.conf in SLURM_CONF",
    "Unable to contact slurm controller": "the Slurm controller does not answer; is slurmctld up, and this "
    "machine in its network?",
}


class Backend:
    """Submits with sbatch, queries squeue and scontrol, cancels with scancel."""

    def files(self, job: Job) -> dict[str, str]:
        """The batch script."""
        for option in job.site.slurm.options:
            if not option.startswith("-") or "\n" in option:
                raise UserError(
                    f"slurm.options: '{option}' is no option of sbatch; write --name=value"
                )
        return {
            "job.sbatch": job.render("slurm.sbatch.j2", python_version=platform.python_version())
        }

    def check(self, job: Job) -> None:
        """Ask Slurm whether it could ever start this job.

        Raises:
            UserError: if Slurm's commands are missing or the partition is unknown; otherwise with
                Slurm's message.
        """
        check_save_fits(job)
        for program in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
            if not shutil.which(program):
                raise UserError(
                    f"--cluster slurm: there is no {program} on this machine; submit from a login node"
                )
        partition = job.site.slurm.partition
        known = {name.strip("*") for name in _ask(["sinfo", "--noheader", "--format=%P"]).split()}
        if partition and not set(partition.split(",")) <= known:
            raise UserError(
                f"slurm.partition: there is no partition '{partition}'; choose from: "
                f"{', '.join(sorted(known))}"
            )
        script = self.files(job)["job.sbatch"]
        _ask(["sbatch", "--test-only"], script, rejected="Slurm would not run this job")

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Submit the script with sbatch; the id is Slurm's job id."""
        answer = _ask(
            ["sbatch", "--parsable", str(job.folder / "job.sbatch")],
            rejected="sbatch rejected the job",
        )
        return answer.strip().partition(";")[0], {}

    def state(self, record: Record) -> State:
        """From squeue and scontrol; for jobs unknown there, from sacct or the run folder."""
        line = _ask(
            ["squeue", "--noheader", "--states=all", "--jobs", record.id, "--format=%T|%r|%N"],
            unknown_is_empty=True,
        ).strip()
        if not line:
            return _forgotten(record)
        state, reason, nodes = line.splitlines()[0].split("|")
        if state in PENDING:
            return State("pending", "" if reason == "None" else reason)
        if state in RUNNING:
            return State("running", nodes)
        if state == "COMPLETED":
            if record.finished:
                return State("completed")
            return State("failed", "the job ended before the run did: it was asked to save and end")
        if state == "CANCELLED":
            return State("cancelled")
        shown = _ask(["scontrol", "show", "job", record.id], unknown_is_empty=True)
        code = re.search(r"ExitCode=(\d+):(\d+)", shown)
        detail = f"exit code {code.group(1)}, signal {code.group(2)}" if code else reason
        return State("failed", f"{state.lower()}, {detail}")

    def cancel(self, record: Record) -> None:
        """Cancel the job, and wait until none of its processes is left."""
        _ask(["scancel", record.id], unknown_is_empty=True)
        deadline = time.monotonic() + GONE_WITHIN_SECONDS
        while _ask(
            ["squeue", "--noheader", "--jobs", record.id, "--format=%T"], unknown_is_empty=True
        ).strip():
            if time.monotonic() > deadline:
                raise UserError(
                    f"job {record.id} is still ending after {GONE_WITHIN_SECONDS:.0f} s; see: "
                    f"squeue --jobs {record.id}"
                )
            time.sleep(0.5)


def check_save_fits(job: Job) -> None:
    """Check that a checkpoint can be written between the warning and the time limit.

    Raises:
        UserError: naming the seconds that it takes at the site's speed.
    """
    slurm, (parameters, _) = job.site.slurm, model_size(job.recipe)
    share = STATE_BYTES * parameters / job.nodes
    seconds = math.ceil(share / (slurm.save_mb_per_second * 1e6))
    if slurm.time and seconds > slurm.save_seconds:
        raise UserError(
            f"slurm.save_seconds: a node writes {share / 1e9:.0f} GB of {job.recipe.name}'s checkpoint in "
            f"{seconds} s at {slurm.save_mb_per_second} MB/s (slurm.save_mb_per_second), and is told to "
            f"{slurm.save_seconds} s before its time limit; set at least {seconds + SPARE_SECONDS}"
        )


def _forgotten(record: Record) -> State:
    if record.finished:
        return State("completed")
    if shutil.which("sacct"):
        done = subprocess.run(
            ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", record.id,
             "--format=State,ExitCode"],
            capture_output=True, text=True, check=False, timeout=ASK_SECONDS,
        )  # fmt: skip
        state, _, code = done.stdout.strip().partition("|")
        if state.startswith("CANCELLED"):
            return State("cancelled")
        if state:
            return State("failed", f"{state.lower()}, exit code {code}")
    return State("failed", "Slurm has forgotten the job, and its run has not finished")


def _ask(
    command: Sequence[str],
    text: str | None = None,
    rejected: str = "",
    unknown_is_empty: bool = False,
) -> str:
    """Run a Slurm command and return its output.

    Raises:
        UserError: with the reason in one line; with `unknown_is_empty`, not for an unknown job.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine; ask from a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} has not answered within {ASK_SECONDS} s; is slurmctld up?"
        ) from None
    if done.returncode == 0:
        return done.stdout
    if unknown_is_empty and "Invalid job id" in done.stderr:
        return ""
    for words, meaning in NO_CLUSTER.items():
        if words in done.stderr:
            raise UserError(f"{command[0]}: {meaning}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = "; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in lines) or "no reason given"
    raise UserError(f"{rejected or command[0]}: {reason}")


def world_info_of_node(nodes: int, gpus_per_node: int, visible: str | None) -> str:
    """`--world_info` for this node's launcher, which assigns the listed devices to its ranks.

    Args:
        nodes: number of nodes; for the other nodes, only the number of devices matters here.
        gpus_per_node: ranks per node.
        visible: CUDA_VISIBLE_DEVICES as set by Slurm, for example "4,5" on a shared node; None or
            empty if Slurm does not manage GPUs.

    Raises:
        UserError: if Slurm has assigned a different number of GPUs.
    """
    own = visible.split(",") if visible else [str(number) for number in range(gpus_per_node)]
    if len(own) != gpus_per_node:
        raise UserError(
            f"{platform.node()}: Slurm gave the job GPUs {visible} on this node, and it wants "
            f"{gpus_per_node}; see slurm.gpus and slurm.options in the site file"
        )
    devices = [int(device) if device.isdecimal() else device for device in own]
    return encode_world_info({f"node{number}": devices for number in range(nodes)})


if __name__ == "__main__":
    with one_line_errors():
        visible_here = os.environ.get("CUDA_VISIBLE_DEVICES")
        print(world_info_of_node(int(sys.argv[1]), int(sys.argv[2]), visible_here))
