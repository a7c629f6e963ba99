"""Site settings in one small YAML: partition, account, image, interface, environment.

launch/cluster/site.example.yaml documents every key. Templates contain no site-specific names.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from launch.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Slurm(_Block):
    """Options of sbatch; None means the cluster's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    save_seconds: PositiveInt = 300  # how long before the time limit the run is told to save
    save_mb_per_second: PositiveInt = 500  # what a node writes to the runs folder
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    requeue: bool = True
    options: list[str] = []
    modules: list[str] = []
    image: str | None = None  # for the pyxis plugin of Slurm
    mounts: list[str] = []


class Hosts(_Block):
    """Hosts for ssh or mpirun, in rank order."""

    hostfile: str | None = None
    hosts: list[str] = []


class Kubernetes(_Block):
    """Settings of pods. `claim` is a volume that all pods can write to."""

    namespace: str = "default"
    image: str | None = None
    claim: str | None = None
    mount: str = "/runs"
    gpu_resource: str = "nvidia.com/gpu"
    shared_memory: str = "16Gi"
    runtime: str = "torch-distributed"  # Kubeflow's training runtime
    node_selector: dict[str, str] = {}


class SkyPilot(_Block):
    """The hosts to rent; `accelerators` has no count, which is --gpus-per-node."""

    accelerators: str | None = None
    infra: str | None = None
    image: str | None = None
    bucket: str | None = None  # an object store, mounted at `mount`
    mount: str = "/runs"


class Site(_Block):
    """One site. `runs` is a folder visible to every host; `python` must exist on every host."""

    python: str | None = None
    runs: str | None = None
    interface: str | None = None
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    environment: dict[Name, str] = {}
    slurm: Slurm = Slurm()
    hosts: Hosts = Hosts()
    kubernetes: Kubernetes = Kubernetes()
    skypilot: SkyPilot = SkyPilot()


def load_site(path: Path | None) -> Site:
    """Read a site file; without one, the cluster's defaults apply.

    Raises:
        UserError: naming the file and the key.
    """
    if path is None:
        return Site()
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--site: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a site is a mapping; see launch/cluster/site.example.yaml")
    # YAML parses NCCL_DEBUG: 1 as a number, but environment variables are strings.
    if isinstance(values.get("environment"), dict):
        values["environment"] = {k: _as_text(v) for k, v in values["environment"].items()}
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        wrong = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(
            f"{path}: {key}: {wrong}; see launch/cluster/site.example.yaml for what there is"
        ) from None


def _as_text(value: object) -> object:
    if isinstance(value, bool):
        raise UserError("environment: put true and false between quotes, YAML changes them")
    return str(value) if isinstance(value, int | float) else value
