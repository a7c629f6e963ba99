"""SkyPilot: a task on rented hosts, with the runs in a bucket."""

import re

from launch.cluster.backends.containers import ask, container_script, name_of, require
from launch.cluster.backends.kubeflow import WRITE_RECIPE
from launch.cluster.job import Job
from launch.cluster.job_store import Record, State

HINT = "run: pip install 'skypilot[aws]' (or your cloud's name) in an environment of its own"
# Map states of `sky queue` (PENDING, SETTING_UP, RUNNING, ...) to ours.
STATES: dict[str, State] = {
    "INIT": State("pending"),
    "PENDING": State("pending"),
    "SETTING_UP": State("pending", "the host is being set up"),
    "RUNNING": State("running"),
    "SUCCEEDED": State("completed"),
    "FAILED": State("failed"),
    "FAILED_SETUP": State("failed", "the set-up failed"),
    "FAILED_DRIVER": State("failed", "the driver died"),
    "CANCELLED": State("cancelled"),
}


class Backend:
    """Submits with sky."""

    def files(self, job: Job) -> dict[str, str]:
        """One task file."""
        sky, config = job.site.skypilot, f"/tmp/job/{job.recipe.name}.yaml"
        require(sky.accelerators, "skypilot.accelerators", "H100")
        require(sky.bucket, "skypilot.bucket", "s3://my-runs")
        require(sky.image, "skypilot.image", "docker:registry.example/train:1")
        script = container_script(
            job, "$SKYPILOT_NODE_RANK", '$(echo "$SKYPILOT_NODE_IPS" | head -n1)', config,
            WRITE_RECIPE.format(config=config),
        )  # fmt: skip
        return {
            "skypilot.yaml": job.render(
                "skypilot.yaml.j2", sky=sky, name=name_of(job), script=script
            )
        }

    def check(self, job: Job) -> None:
        """Check that sky is installed.

        Raises:
            UserError: if it is not.
        """
        ask(["sky", "--version"], HINT)

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Rent the hosts and start the task; they are released when it is over."""
        name = name_of(job)
        file = str(job.folder / "skypilot.yaml")
        ask(["sky", "launch", "--yes", "--detach-run", "--down", "--cluster", name, file], HINT)
        return name, {}

    def state(self, record: Record) -> State:
        """Derived from the queue of the rented cluster, which has only this job."""
        shown = ask(["sky", "queue", record.id], HINT)
        words = re.findall("|".join(rf"\b{word}\b" for word in STATES), shown)
        return STATES[words[-1]] if words else State("unknown")

    def cancel(self, record: Record) -> None:
        """Release the hosts."""
        ask(["sky", "down", "--yes", record.id], HINT)
