"""What every cluster can do for a job, and which module does it."""

import importlib
from typing import Protocol, cast

from launch.cluster.job import Job
from launch.cluster.job_store import Record, State

# Each module has a class Backend. Where the hosts see this machine's disk, the job's files lie there.
MODULES = {
    "slurm": "slurm",
    "ssh": "ssh_hosts",
    "openmpi": "openmpi",
    "k8s": "kubernetes",
    "kubeflow": "kubeflow",
    "skypilot": "skypilot",
}
SHARED_DISK = {"slurm", "ssh", "openmpi"}


class Backend(Protocol):
    """One kind of cluster."""

    def files(self, job: Job) -> dict[str, str]:
        """The rendered files by name, the one to read first in front. Touches nothing.

        Raises:
            UserError: where the site's settings lack something.
        """

    def check(self, job: Job) -> None:
        """Look, before anything is written, whether the cluster would take and run the job.

        Raises:
            UserError: for what would not work, in words.
        """

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Hand the job over; its files are written. Returns its id, and details for its record.

        Raises:
            UserError: where the cluster rejects it.
        """

    def state(self, record: Record) -> State:
        """Where the job is now.

        Raises:
            UserError: where the cluster cannot be asked.
        """

    def cancel(self, record: Record) -> None:
        """End the job at once, on every host; return when no process of it is left, or it is known to end.

        Raises:
            UserError: where it cannot be ended.
        """


def backend_of(cluster: str) -> Backend:
    """The backend of one of `MODULES`."""
    module = importlib.import_module(f"launch.cluster.{MODULES[cluster]}")
    return cast(Backend, module.Backend())
