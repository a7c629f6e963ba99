"""Jobs on the virtual hosts: a small recipe, the real scripts/submit.py on the hub, and what came of it."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.config.load import recipe_from_dict
from launch.paths import ROOT
from launch.runtime.run_dir import read_metrics
from tests.cli.commands import Ended
from tests.cluster.virtual import Cluster
from tests.ranks import run_ranks
from tests.resume.runs import write_text

RANKS, NODES = 4, 2
# How often the time that an idle machine takes: a limit ends a hang, and is no measure of speed.
PATIENCE = 8.0
ENDS_WITHIN_SECONDS = 60.0  # a job, once one of its ranks has failed
MANY = 100_000  # steps that no test waits for
LAUNCHERS = ("ssh", "openmpi")  # of hosts without a batch system
AWKWARD = """a 'single' "double" $HOME `id` \\ 100%h %n ${x} #!;&|"""

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2": {},
    "pp2_tp2": {
        "parallel": {"pipeline": 2, "tensor": 2},
        "deepspeed": {"config": "ds_configs/zero1.json", "bf16": {"enabled": False}},
    },
}


@dataclass(frozen=True)
class Submitted:
    """What `submit.py` printed, and the id and run folder in it."""

    ended: Ended
    id: str
    run: Path

    @property
    def logs(self) -> list[Path]:
        """A log a rank and start."""
        return sorted((self.run / "job/logs").glob("*.log"))

    @property
    def ranks_with_logs(self) -> list[int]:
        """The ranks that wrote one; a log's name begins with its host's time of start."""
        return sorted(int(log.stem.partition("_rank")[2]) for log in self.logs)


def recipe_values(cluster: Cluster, steps: int = 4, **blocks: Any) -> dict[str, Any]:
    """A recipe of 37 thousand parameters, with dropout, in fp32; `blocks` take the place of whole ones."""
    write_text(cluster.folder / "text")
    return {
        "model": {"layers": 2, "hidden": 32, "heads": 2, "vocab": 320, "context": 32, "dropout": 0.1},
        "data": {"source": str(cluster.folder / "text"), "sequence_length": 32,
                 "cache_dir": str(cluster.folder / "cache")},
        "train": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 2, "eval_batches": 1},
        "deepspeed": {"config": "ds_configs/zero2.json", "bf16": {"enabled": False}},
        "checkpoint": {"every": 2},
        "run": {"tensorboard": False, "sample_tokens": 0},
        **blocks,
    }  # fmt: skip


def write_yaml(file: Path, values: Mapping[str, Any]) -> Path:
    """Write values as YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return file


def site(cluster: Cluster, name: str, **changes: Any) -> Path:
    """A site file whose runs folder every host sees."""
    values = {"runs": str(cluster.folder / "runs"), "interface": "eth0", **changes}
    return write_yaml(cluster.folder / f"site-{name}.yaml", values)


def recipe(cluster: Cluster, name: str, **changes: Any) -> Path:
    """A recipe's file; `changes` as `recipe_values`."""
    return write_yaml(cluster.folder / f"{name}.yaml", recipe_values(cluster, **changes))


def hosts(cluster: Cluster, name: str = "hosts", **changes: Any) -> Path:
    """A site file that names the two hosts, for ssh and OpenMPI."""
    return site(cluster, name, **{"hosts": {"hosts": list(cluster.hosts)}, **changes})


def submit(
    cluster: Cluster, kind: str, recipe: Path, site_file: Path, *words: str, gpus: int = 2
) -> Submitted:
    """Submit to two nodes; it has to succeed."""
    ended = try_submit(cluster, kind, recipe, site_file, *words, gpus=gpus)
    assert ended.code == 0, ended.output
    return told(ended)


def try_submit(
    cluster: Cluster, kind: str, recipe: Path, site_file: Path, *words: str, gpus: int = 2,
    nodes: int = NODES,
) -> Ended:  # fmt: skip
    """Submit, whatever comes of it."""
    return cluster.run(
        [sys.executable, ROOT / "scripts/submit.py", "--recipe", recipe, "--cluster", kind,
         "--nodes", str(nodes), "--gpus-per-node", str(gpus), "--site", site_file, *words],
        timeout=1000,
    )  # fmt: skip


def told(ended: Ended) -> Submitted:
    """The id and the run folder that a submission has printed."""
    job = re.search(r"^job: (\S+)$", ended.output, re.M)
    run = re.search(r"^run folder: (.+)$", ended.output, re.M)
    assert job and run, ended.output
    return Submitted(ended, job.group(1), Path(run.group(1)))


def care(cluster: Cluster, *words: str) -> Ended:
    """`submit.py status` or `submit.py cancel`."""
    return cluster.run([sys.executable, ROOT / "scripts/submit.py", *words], timeout=1000)


def state(cluster: Cluster, job: Submitted) -> str:
    """What `submit.py status` says of a job."""
    shown = care(cluster, "status", str(job.run))
    assert shown.code == 0, shown.output
    return shown.output


@contextmanager
def unknown_key(cluster: Cluster, host: str) -> Iterator[None]:
    """Let ssh forget a host's key for a while."""
    settings = cluster.run(["ssh", "-G", host]).output
    named = re.search(r"^userknownhostsfile (\S+)", settings, re.M)
    assert named
    file = Path(named.group(1))
    kept = file.read_text()
    file.write_text("".join(line for line in kept.splitlines(True) if host not in line))
    try:
        yield
    finally:
        file.write_text(kept)


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something outside this process."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)


def steps(run: Path) -> list[int]:
    """The steps that a run has logged."""
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def wait_for_step(job: Submitted, step: int, seconds: float = 120.0) -> None:
    """Wait until a job has trained so far."""

    def there() -> bool:
        return max(steps(job.run), default=0) >= step

    wait_until(there, seconds, f"step {step} of {job.run}")


def training(cluster: Cluster, host: str) -> dict[int, psutil.Process]:
    """The ranks that run on a host, by number."""
    found = {}
    for process in cluster.ranks(host):
        try:
            if any(part.endswith("launch/train.py") for part in process.cmdline()):
                rank = process.environ().get("RANK")
                # The launcher has the script among its own arguments, and no rank.
                if rank is not None and "deepspeed.launcher.launch" not in process.cmdline():
                    found[int(rank)] = process
        except psutil.Error:
            continue
    return found


def hang(cluster: Cluster, host: str) -> None:
    """Suspend the ranks of a host and their launcher (not srun): SIGTERM ends none of them."""
    for process in cluster.ranks(host):
        if process.name().startswith("python"):
            process.suspend()


def wait_for_nothing_left(cluster: Cluster, seconds: float = ENDS_WITHIN_SECONDS) -> None:
    """No rank and no launcher on any host."""

    def empty() -> bool:
        return not any(cluster.ranks(host) for host in cluster.hosts)

    wait_until(empty, seconds, "every process of the job has ended")


def train_on_one_host(values: dict[str, Any], run: Path, ranks: int = RANKS) -> Path:
    """The same recipe on as many ranks of this machine, never interrupted; its run folder."""
    here = {**values, "name": "whole", "run": {**values["run"], "dir": str(run)}}
    run_ranks(_train, ranks, here, timeout=1000)
    return run


def _train(values: dict[str, Any]) -> None:
    import launch.train

    launch.train.train(recipe_from_dict(values), None)
