"""The interface of all cluster backends, and the module of each."""

import importlib
from typing import Protocol, cast

from launch.cluster.job import Job
from launch.cluster.job_store import Record, State

# Each module has a class Backend. If the hosts see this machine's disk, the job's files are there.
MODULES = {
    "slurm": "slurm",
    "ssh": "ssh",
    "openmpi": "openmpi",
    "k8s": "kubernetes",
    "kubeflow": "kubeflow",
    "skypilot": "skypilot",
}
SHARED_DISK = {"slurm", "ssh", "openmpi"}


class Backend(Protocol):
    """One kind of cluster."""

    def files(self, job: Job) -> dict[str, str]:
        """The rendered files by name, the main one first. No side effects.

        Raises:
            UserError: if a site setting is missing.
        """

    def check(self, job: Job) -> None:
        """Check, before anything is written, that the cluster would accept and run the job.

        Raises:
            UserError: naming what would not work.
        """

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Submit the job, whose files are written. Returns its id and details for its record.

        Raises:
            UserError: if the cluster rejects it.
        """

    def state(self, record: Record) -> State:
        """The job's current state.

        Raises:
            UserError: if the cluster cannot be queried.
        """

    def cancel(self, record: Record) -> None:
        """End the job at once on every host; return when its processes are gone or certain to end.

        Raises:
            UserError: if it cannot be ended.
        """


def backend_of(cluster: str) -> Backend:
    """The backend for a key of `MODULES`."""
    module = importlib.import_module(f"launch.cluster.backends.{MODULES[cluster]}")
    return cast(Backend, module.Backend())
