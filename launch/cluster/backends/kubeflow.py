"""Kubeflow Trainer: a TrainJob on its torch runtime, which creates and numbers the pods."""

from launch.cluster.backends import kubernetes
from launch.cluster.backends.containers import (
    container_script,
    environment,
    literal,
    name_of,
    require,
)
from launch.cluster.job import Job

# A TrainJob cannot mount our ConfigMap before its pods exist, so the recipe is sent in a variable.
WRITE_RECIPE = 'mkdir -p /tmp/job && printf "%s" "$RECIPE_YAML" >{config}'


class Backend(kubernetes.Backend):
    """Submits with kubectl; state and cancel work as for a Job."""

    resource, template, file = "trainjob", "kubeflow.yaml.j2", "kubeflow.yaml"

    def files(self, job: Job) -> dict[str, str]:
        """One manifest."""
        kube, config = job.site.kubernetes, f"/tmp/job/{job.recipe.name}.yaml"
        require(
            kube.image, "kubernetes.image", "registry.example/train:1 (launch/cluster/Dockerfile)"
        )
        require(kube.claim, "kubernetes.claim", "runs, a PersistentVolumeClaim with ReadWriteMany")
        script = container_script(
            job, "$PET_NODE_RANK", "$PET_MASTER_ADDR", config, WRITE_RECIPE.format(config=config)
        )
        text = job.render(
            self.template, kube=kube, name=name_of(job), script=literal(script),
            environment=environment(job), recipe_yaml=literal(job.recipe_yaml),
            grace=kubernetes.GRACE_SECONDS,
        )  # fmt: skip
        return {self.file: text}
