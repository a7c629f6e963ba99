"""A job: a checked recipe, the number of nodes, a site, and the folder with its files.

<run folder>/job/
    <recipe>.yaml   the recipe with overrides applied, so that nothing is passed through a shell
    ...             the cluster's files, rendered from the templates in backends/
    logs/           one file per rank and start, <time>_rank<N>.log
    job.json        the record of the submission
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import OmegaConf

from launch.cluster.site import Site
from launch.config.layout import Layout, plan_layout
from launch.config.load import load_recipe, read_values
from launch.config.resolve import resolve
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.world_info import encode_world_info

TEMPLATES = Path(__file__).resolve().with_name("backends")


@dataclass(frozen=True)
class Job:
    """A job to submit. `run` is the run folder as seen by the job's hosts, `folder` is local."""

    cluster: str
    recipe: Recipe
    recipe_yaml: str
    layout: Layout
    nodes: int
    gpus_per_node: int
    site: Site
    run: Path
    folder: Path
    checkout: Path = ROOT

    @property
    def name(self) -> str:
        """The recipe's name, in characters that every cluster accepts."""
        return self.recipe.name.replace("_", "-").lower()

    @property
    def config(self) -> Path:
        """The job's recipe."""
        return self.folder / f"{self.recipe.name}.yaml"

    @property
    def logs(self) -> Path:
        """One file per rank."""
        return self.folder / "logs"

    @property
    def python(self) -> str:
        """The interpreter on every host."""
        return self.site.python or sys.executable

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every rank: the site's variables, and its interface for NCCL and gloo."""
        chosen = self.site.interface
        network = {"NCCL_SOCKET_IFNAME": chosen, "GLOO_SOCKET_IFNAME": chosen} if chosen else {}
        return {**network, **self.site.environment}

    @property
    def world_info(self) -> str:
        """Nodes and their devices, encoded for `deepspeed.launcher.launch --world_info`."""
        devices = list(range(self.gpus_per_node))
        return encode_world_info({f"node{number}": devices for number in range(self.nodes)})

    @property
    def train(self) -> list[str]:
        """The training command, the same for each rank and each start of the job."""
        return ["launch/train.py", "--config", str(self.config), "--resume", "auto"]

    def render(self, template: str, **more: object) -> str:
        """Render a template of backends/ with `job` (this object) and `q` (shell quoting)."""
        # No autoescaping, as these are scripts. External values must go through q or tojson.
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["q"] = lambda value: shlex.quote(str(value))
        return environment.get_template(template).render(job=self, site=self.site, **more)


def make_job(
    cluster: str,
    recipe_file: str,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    site: Site,
    shared_disk: bool,
) -> Job:
    """Check a recipe against the number of ranks, and choose the job's folder.

    Args:
        cluster: the value of `scripts/submit.py --cluster`.
        recipe_file: see `launch.config.load.load_recipe`.
        overrides: see `launch.config.load.load_recipe`. If they set run.dir, the job resumes that
            run from its newest checkpoint.
        nodes: number of hosts.
        gpus_per_node: ranks per host.
        site: the site's settings.
        shared_disk: whether the hosts see this machine's folders; otherwise the run folder is on
            their own volume, and the job's files stay here.

    Raises:
        UserError: for numbers below one, and for errors in the recipe or layout.
    """
    for flag, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{flag}: {value} is too few; use 1 or more")
    recipe = load_recipe(recipe_file, overrides)
    layout = plan_layout(recipe, nodes * gpus_per_node)
    here = ROOT / "runs"
    runs = Path(site.runs).expanduser().absolute() if site.runs else here
    if not shared_disk:
        runs = Path(_mount(cluster, site))
    where = Path(recipe.name) / time.strftime("%Y%m%d-%H%M%S")
    run = Path(recipe.run.dir).expanduser() if recipe.run.dir else runs / where
    if not run.is_absolute():
        run = ROOT / run
    folder = (run if shared_disk else here / recipe.name / run.name) / "job"
    _, values = read_values(recipe_file, overrides)
    # The hosts resolve interpolations, so interpolation syntax in our paths must be escaped.
    OmegaConf.update(values, "run.dir", str(run).replace("${", "\\${"), force_add=True)
    text = f"# {recipe_file} as it was submitted, with its overrides.\n{OmegaConf.to_yaml(values)}"
    return Job(cluster, recipe, text, layout, nodes, gpus_per_node, site, run, folder)


def check_config(job: Job) -> None:
    """Check the job's DeepSpeed config as a rank would. It loads DeepSpeed, which takes seconds.

    Raises:
        UserError: for errors in the config.
    """
    resolve(job.recipe, job.layout)


def _mount(cluster: str, site: Site) -> str:
    return site.skypilot.mount if cluster == "skypilot" else site.kubernetes.mount


def notes(job: Job) -> list[str]:
    """Warnings to show before the job runs."""
    found = []
    if job.layout.grid["tensor"] > job.gpus_per_node:
        found.append(
            f"note: tensor parallel size {job.layout.grid['tensor']} is larger than the "
            f"{job.gpus_per_node} GPUs of a node: each layer's all-reduces cross the network. "
            "See recipes/BENCHMARKS.md"
        )
    if not job.recipe.checkpoint.every:
        found.append(
            "note: checkpoint.every is 0: a job that is killed without warning starts at step 0 again"
        )
    return found


def write_files(job: Job, files: dict[str, str]) -> None:
    """Write the job's recipe and rendered files to its folder.

    Raises:
        UserError: if the folder is not writable.
    """
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        job.config.write_text(job.recipe_yaml)
        for name, text in files.items():
            (job.folder / name).write_text(text)
    except OSError as error:
        raise UserError(
            f"site.runs: cannot write to {job.folder} ({error.strerror}); name a folder that this "
            "machine and every host can write to"
        ) from None
