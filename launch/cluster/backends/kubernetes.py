"""Kubernetes: an Indexed Job, one pod per node, a headless Service, and a ConfigMap (recipe)."""

from launch.cluster.backends.containers import (
    ask,
    ask_json,
    container_script,
    environment,
    literal,
    name_of,
    require,
)
from launch.cluster.job import Job
from launch.cluster.job_store import Record, State
from launch.errors import UserError

HINT = "install kubectl and point it at your cluster"
GRACE_SECONDS = 300


class Backend:
    """Submits with kubectl."""

    resource, template, file = "job", "kubernetes.yaml.j2", "kubernetes.yaml"

    def files(self, job: Job) -> dict[str, str]:
        """One file with all manifests."""
        kube, name = job.site.kubernetes, name_of(job)
        require(
            kube.image, "kubernetes.image", "registry.example/train:1 (launch/cluster/Dockerfile)"
        )
        require(kube.claim, "kubernetes.claim", "runs, a PersistentVolumeClaim with ReadWriteMany")
        config = f"/job/{job.recipe.name}.yaml"
        script = container_script(job, "$NODE_RANK", "$MASTER_ADDR", config)
        text = job.render(
            self.template, kube=kube, name=name, recipe_file=f"{job.recipe.name}.yaml",
            script=literal(script),
            environment=environment(job), grace=GRACE_SECONDS,
        )  # fmt: skip
        return {self.file: text}

    def check(self, job: Job) -> None:
        """Ask the cluster whether it would accept the manifests.

        Raises:
            UserError: if kubectl is missing, or with kubectl's message.
        """
        ask(["kubectl", "get", self.resource, "--namespace", job.site.kubernetes.namespace], HINT)

    def submit(self, job: Job) -> tuple[str, dict[str, str]]:
        """Apply the manifests; the id is the job's name."""
        ask(["kubectl", "apply", "--filename", str(job.folder / self.file)], HINT)
        return name_of(job), {"namespace": job.site.kubernetes.namespace}

    def state(self, record: Record) -> State:
        """Derived from the job's conditions."""
        try:
            status = ask_json(
                ["kubectl", "get", self.resource, record.id, "--namespace",
                 record.details["namespace"], "--output", "json"], HINT,
            ).get("status", {})  # fmt: skip
        except UserError as error:
            if "NotFound" in str(error):
                return State("cancelled", "the cluster does not have it any more")
            raise
        for condition in status.get("conditions", []):
            if condition.get("status") != "True":
                continue
            if condition["type"] == "Complete":
                return State("completed")
            if condition["type"] == "Failed":
                return State("failed", str(condition.get("message", "")))
        # A TrainJob reports its pod counts in a list of jobs.
        jobs = status.get("jobsStatus", [status])
        active, ready = (sum(job.get(key, 0) for job in jobs) for key in ("active", "ready"))
        if active:
            return State("running", f"{ready} of {active} pods ready")
        return State("pending")

    def cancel(self, record: Record) -> None:
        """Delete the job; its pods get SIGTERM, and the run saves before they end."""
        ask(
            [
                "kubectl",
                "delete",
                "--filename",
                f"{record.folder}/{self.file}",
                "--ignore-not-found",
            ],
            HINT,
        )
