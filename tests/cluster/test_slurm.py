"""Jobs on a real Slurm of two nodes: the same training as on one host, and every way to end."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.paths import ROOT
from tests.cluster.jobs import (
    AWKWARD,
    LAYOUTS,
    MANY,
    Submitted,
    care,
    hang,
    losses,
    recipe,
    recipe_values,
    site,
    state,
    steps,
    submit,
    train_on_one_host,
    training,
    try_submit,
    wait_for_nothing_left,
    wait_for_step,
    wait_until,
    write_yaml,
)
from tests.cluster.virtual import Cluster


def write_inline(text: str) -> str:
    """Text as a YAML scalar of one line."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def neighbour(cluster: Cluster) -> Iterator[None]:
    """GPUs 0 and 1 of each node belong to somebody else for a while."""
    job = cluster.run(
        ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null",
         "--wrap", "srun sleep 1200"]
    )  # fmt: skip
    assert job.code == 0, job.output
    try:
        yield
    finally:
        assert cluster.run(["scancel", job.output.strip()]).code == 0


# Submitted as settings of the recipe, which have to arrive as they are.
PROMPT = "run.sample_prompt=" + write_inline(AWKWARD.replace("${", "\\${"))


def check_start(cluster: Cluster, gpus: str) -> None:
    """Wait for a rank for each of these GPUs on each node; they have the site's environment."""
    count = len(gpus.split(","))

    def started() -> bool:
        return all(len(training(cluster, host)) == count for host in cluster.hosts)

    wait_until(started, 90, f"{count} ranks on each node")
    for number, host in enumerate(cluster.hosts):
        ranks = training(cluster, host)
        assert sorted(ranks) == [*range(count * number, count * (number + 1))]
        for process in ranks.values():
            assert process.environ()["NOTE"] == AWKWARD
            assert process.environ()["CUDA_VISIBLE_DEVICES"] == gpus


def check_end(cluster: Cluster, job: Submitted, ranks: int, starts: int = 1) -> None:
    """Each rank has written a log a start, each node its own, and the prompt has arrived."""
    assert job.ranks_with_logs == sorted([*range(ranks)] * starts)
    assert yaml.safe_load((job.run / "recipe.yaml").read_text())["run"]["sample_prompt"] == AWKWARD
    for host in cluster.hosts:
        assert f"{host}" in (job.run / f"job/slurm-{job.id}.log").read_text()
    wait_for_nothing_left(cluster)


@pytest.mark.matrix  # near a time limit; over two hosts: test_hosts.py
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_nodes_train_what_one_host_trains(
    cluster: Cluster, layout: str, tmp_path: Path
) -> None:
    values = recipe_values(cluster, steps=6, **LAYOUTS[layout])
    file = write_yaml(cluster.folder / f"slurm_{layout}.yaml", values)
    place = site(cluster, layout, slurm={"partition": "gpu"}, environment={"NOTE": AWKWARD})
    with neighbour(cluster):
        job = submit(cluster, "slurm", file, place, "--set", PROMPT)
        check_start(cluster, "2,3")
        followed = care(cluster, "status", "--follow", str(job.run))
    assert followed.code == 0, followed.output
    assert "step 6/6" in followed.output

    whole = train_on_one_host(values, tmp_path / "whole")
    assert losses(job.run) == pytest.approx(losses(whole), rel=1e-6)
    check_end(cluster, job, ranks=4)


def test_a_job_near_its_time_limit_saves_and_goes_on_to_the_same_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    values = recipe_values(cluster, steps=40, checkpoint={"every": 0})
    values["train"] |= {"global_batch_size": 4}
    file = write_yaml(cluster.folder / "slurm_limit.yaml", values)
    # The signal comes a minute after the start, or up to 30 s earlier; a slow machine then has 19
    # minutes to save.
    slurm = {"time": "20", "save_seconds": 19 * 60, "partition": "gpu"}
    blanks = str(cluster.folder / "runs with 50% blanks")
    place = site(cluster, "limit", slurm=slurm, runs=blanks, environment={"NOTE": AWKWARD})
    # On a slow link, where a step takes some two seconds, no machine has done all by then.
    with neighbour(cluster):
        with cluster.limit("500kbit"):
            job = submit(cluster, "slurm", file, place, "--set", PROMPT, gpus=1)
            check_start(cluster, "2")
            wait_until(lambda: (job.run / "checkpoints").is_dir(), 150, "the run saves")
        # Once is enough: on a slow machine, each further start would get no further than a step.
        longer = cluster.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=600"])
        assert longer.code == 0, longer.output
        followed = care(cluster, "status", "--follow", str(job.run))
    log = (job.run / f"job/slurm-{job.id}.log").read_text()
    assert followed.code == 0, followed.output + log
    assert "saved before the time limit" in log
    assert "start 1 of job" in log
    first = "".join(log.read_text() for log in job.logs if log.stem.endswith("rank0"))
    assert "stopped on request after step" in first
    assert "resuming after step" in first
    whole = train_on_one_host(values, tmp_path / "whole", ranks=2)
    name = "model.safetensors"
    assert (job.run / name).read_bytes() == (whole / name).read_bytes()
    check_end(cluster, job, ranks=2, starts=2)


@pytest.mark.matrix  # what srun tells each rank: tests/unit/test_rank_env.py
def test_plain_srun_starts_one_world(cluster: Cluster) -> None:
    """Two nodes, of which nobody says where the ranks meet."""
    file = write_yaml(cluster.folder / "srun.yaml", recipe_values(cluster, steps=2))
    done = cluster.run(
        ["srun", "--partition=gpu", "--nodes=2", "--ntasks=4", sys.executable, ROOT / "launch/train.py",
         "--config", file, "--set", f"run.dir={cluster.folder}/srun", "train.global_batch_size=4"],
        timeout=600,
    )  # fmt: skip
    assert done.code == 0, done.output
    assert done.output.count("4 ranks = pipeline 1 x data 4 x tensor 1") == 1


@pytest.mark.matrix  # as on hosts without Slurm
def test_a_cancelled_job_leaves_nothing(cluster: Cluster) -> None:
    job = submit(
        cluster, "slurm", recipe(cluster, "cancel", steps=MANY), site(cluster, "plain"), gpus=1
    )
    wait_for_step(job, 3)
    ended = care(cluster, "cancel", job.id)
    assert ended.code == 0, ended.output
    wait_for_nothing_left(cluster)
    assert "cancelled" in state(cluster, job)


@pytest.mark.matrix  # as of the job whose node died
def test_a_killed_rank_ends_the_job(cluster: Cluster) -> None:
    job = submit(
        cluster, "slurm", recipe(cluster, "rank", steps=MANY), site(cluster, "plain"), gpus=1
    )
    wait_for_step(job, 3)
    training(cluster, cluster.hosts[1])[1].kill()
    wait_for_nothing_left(cluster)
    followed = care(cluster, "status", "--follow", str(job.run))
    assert followed.code == 2
    assert "the connection to another rank is lost" in followed.error()
    assert "logs:" in followed.error()


@pytest.mark.matrix  # as on hosts without Slurm
def test_a_node_whose_ranks_hang_is_ended_when_a_rank_of_another_fails(cluster: Cluster) -> None:
    job = submit(
        cluster, "slurm", recipe(cluster, "hang", steps=MANY), site(cluster, "plain"), gpus=1
    )
    wait_for_step(job, 3)
    hang(cluster, cluster.hosts[0])
    training(cluster, cluster.hosts[1])[1].kill()
    wait_for_nothing_left(cluster)


@pytest.mark.matrix  # starts again as near its time limit; ends with a rank as on hosts without Slurm
def test_a_job_whose_node_dies_goes_on_when_it_is_back_and_ends_with_a_rank(
    cluster: Cluster,
) -> None:
    job = submit(
        cluster, "slurm", recipe(cluster, "node", steps=MANY), site(cluster, "plain"), gpus=1
    )
    wait_for_step(job, 5)
    cluster.kill_host(cluster.hosts[1])
    try:
        wait_until(lambda: "pending" in state(cluster, job), 120, "Slurm puts the job back")
    finally:
        cluster.start_host(cluster.hosts[1])

    def resumed() -> bool:
        return any("resuming after step" in log.read_text() for log in job.logs)

    wait_until(resumed, 120, "the job resumes")
    wait_for_step(job, max(steps(job.run)) + 1)
    training(cluster, cluster.hosts[1])[1].kill()
    wait_for_nothing_left(cluster)
    followed = care(cluster, "status", "--follow", str(job.run))
    assert followed.code == 2
    assert "the connection to another rank is lost" in followed.error()
    assert "logs:" in followed.error()


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        (
            {"slurm": {"partition": "gqu"}},
            2,
            "slurm.partition: there is no partition 'gqu'; choose",
        ),
        ({}, 16, "Slurm would not run this job: "),
        ({"slurm": {"time": "2-00:00:00"}}, 2, "Slurm would not run this job: "),
    ],
    ids=["partition", "GPUs", "time"],
)
def test_what_slurm_refuses_is_told_before_submission(
    cluster: Cluster, changes: dict[str, Any], gpus: int, expected: str
) -> None:
    values = recipe_values(cluster)
    values["train"] |= {"global_batch_size": 64}
    file = write_yaml(cluster.folder / "slurm_rejected.yaml", values)
    ended = try_submit(cluster, "slurm", file, site(cluster, "bad", **changes), gpus=gpus)
    assert ended.code == 2
    assert expected in ended.error()
    assert "\njob: " not in ended.output


@pytest.mark.matrix  # as on one host
def test_a_port_in_use_is_told(cluster: Cluster) -> None:
    listen = "import socket, time; s = socket.create_server(('', 23456)); time.sleep(600)"
    other = cluster.start(["python3", "-c", listen], cluster.hosts[0])
    file = recipe(cluster, "port")
    place = site(cluster, "port", port=23456)
    ended = try_submit(cluster, "slurm", file, place, "--follow", gpus=1)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait(timeout=100)
    assert ended.code == 2
    assert "port 23456 is in use on this machine" in ended.error()
    wait_for_nothing_left(cluster)


def test_a_node_without_the_shared_folder_is_told(cluster: Cluster) -> None:
    (cluster.folder / "runs").mkdir(exist_ok=True)
    with cluster.hide(cluster.hosts[1], cluster.folder / "runs"):
        ended = try_submit(
            cluster, "slurm", recipe(cluster, "hidden"), site(cluster, "plain"), "--follow"
        )
    assert ended.code == 2
    assert f"{cluster.hosts[1]}: there is no {cluster.folder}/runs" in ended.error()


@pytest.mark.matrix  # as on hosts without Slurm
def test_another_python_on_a_node_is_told(cluster: Cluster) -> None:
    python, other = cluster.folder / "slurm-python", cluster.folder / "slurm-other-python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.write_text("#!/bin/sh\necho 3.9.2\n")
    for file in (python, other):
        file.chmod(0o755)
    place = site(cluster, "python", python=str(python))
    second = cluster.hosts[1]
    with cluster.replace(second, python, other):
        ended = try_submit(cluster, "slurm", recipe(cluster, "python"), place, "--follow")
    assert ended.code == 2
    assert f"{second}: Python 3.9.2 at {python}, and 3." in ended.error()
    wait_for_nothing_left(cluster)
