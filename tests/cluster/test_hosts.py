"""Jobs over two ssh hosts, by deepspeed's own front end and by mpirun."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from _pytest.mark import ParameterSet

from launch.paths import ROOT
from tests.cli.commands import wait_for
from tests.cluster.jobs import (
    AWKWARD,
    LAUNCHERS,
    LAYOUTS,
    MANY,
    Submitted,
    care,
    hang,
    hosts,
    losses,
    recipe,
    recipe_values,
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
from tests.selection import representatives

SLOW = "2mbit"  # a step takes about a second, and ranks that wait take no CPU from what is tested


def each_launcher(first: str) -> list[ParameterSet]:
    """All of them; `make test` runs the one that is named, and the launchers take turns in that."""
    return representatives(LAUNCHERS, lambda kind: {kind} & {first})


@pytest.mark.parametrize(
    ("kind", "layout"),
    # Slurm's nodes train the other layout.
    [("ssh", "pp2_tp2"), pytest.param("openmpi", "zero2", marks=pytest.mark.matrix)],
)
def test_two_hosts_train_what_one_trains(
    cluster: Cluster, kind: str, layout: str, tmp_path: Path
) -> None:
    values = recipe_values(cluster, steps=6, **LAYOUTS[layout])
    file = write_yaml(cluster.folder / f"{kind}_{layout}.yaml", values)
    edges = "  blanks at the ends  "
    environment = {"NOTE": AWKWARD, "EDGES": edges, "EMPTY": "", "PLAIN": "a-b_c.d/e"}
    place = hosts(cluster, kind, environment=environment)
    job = submit(cluster, kind, file, place)

    def started() -> bool:
        return all(len(training(cluster, host)) == 2 for host in cluster.hosts)

    wait_until(started, 90, "two ranks on each host")
    for number, host in enumerate(cluster.hosts):
        ranks = training(cluster, host)
        assert sorted(ranks) == [2 * number, 2 * number + 1]
        for process in ranks.values():
            seen = process.environ()
            assert {name: seen.get(name) for name in environment} == environment
            assert seen["GLOO_SOCKET_IFNAME"] == "eth0"
    followed = care(cluster, "status", "--follow", job.id)
    assert followed.code == 0, followed.output + (job.run / "job/job.log").read_text()
    assert "step 6/6" in followed.output

    whole = train_on_one_host(values, tmp_path / "whole")
    assert losses(job.run) == pytest.approx(losses(whole), rel=1e-6)
    assert job.ranks_with_logs == [0, 1, 2, 3]
    assert "completed" in state(cluster, job)
    wait_for_nothing_left(cluster)


@pytest.mark.matrix  # a rank is killed beside a host that hangs as well
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_killed_rank_ends_the_job(cluster: Cluster, kind: str) -> None:
    file = recipe(cluster, f"rank_{kind}", steps=MANY)
    job = submit(cluster, kind, file, hosts(cluster), gpus=1)
    wait_for_step(job, 3)
    training(cluster, cluster.hosts[1])[1].kill()
    wait_for_nothing_left(cluster)
    followed = care(cluster, "status", "--follow", str(job.run))
    assert followed.code == 2
    assert "the connection to another rank is lost" in followed.error()

    # The next job in this run folder fails of something else, and that alone is told.
    again = ["--set", f"run.dir={job.run}", "train.seed=5", "--follow"]
    other = try_submit(cluster, kind, file, hosts(cluster), *again, gpus=1)
    assert other.code == 2
    assert "was saved by another recipe: train.seed was" in other.error()
    assert "the connection to another rank" not in (job.run / "job/job.log").read_text()


@pytest.mark.parametrize("kind", each_launcher("ssh"))
def test_a_host_whose_ranks_hang_is_ended_when_another_fails(cluster: Cluster, kind: str) -> None:
    """What a lost GPU collective does, and worse: on the other host nothing takes notice of anything.

    Before that, the job runs as any other: its folder is taken, and who watches it may leave.
    """
    file = recipe(cluster, f"hang_{kind}", steps=MANY)
    with cluster.limit(SLOW):
        job = submit(cluster, kind, file, hosts(cluster), gpus=1)
        wait_for_step(job, 3)
        check_that_it_runs(cluster, job, kind)
        hang(cluster, cluster.hosts[0])
        training(cluster, cluster.hosts[1])[1].kill()
        wait_for_nothing_left(cluster)
    followed = care(cluster, "status", "--follow", str(job.run))
    assert followed.code == 2
    assert f"job {job.id} failed (exit code " in followed.error()


def check_that_it_runs(cluster: Cluster, job: Submitted, kind: str) -> None:
    """A second job in its folder is refused; Ctrl-C ends who follows it, and not the job."""
    again = ["--set", f"run.dir={job.run}"]
    second = try_submit(cluster, kind, recipe(cluster, "second"), hosts(cluster), *again, gpus=1)
    assert second.code == 2
    assert f"job {job.id} has {job.run} and is running" in second.error()
    submit_py = ROOT / "scripts/submit.py"
    watcher = cluster.start([sys.executable, submit_py, "status", "--follow", job.id])
    wait_for(watcher, "running")
    os.killpg(watcher.pid, signal.SIGINT)
    assert f"job {job.id} goes on" in watcher.communicate(timeout=300)[0]
    assert "running" in state(cluster, job)


@pytest.mark.matrix  # as a node of Slurm
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_job_whose_host_dies_ends(cluster: Cluster, kind: str) -> None:
    second = cluster.hosts[1]
    job = submit(cluster, kind, recipe(cluster, f"dies_{kind}", steps=MANY), hosts(cluster), gpus=1)
    wait_for_step(job, 3)
    cluster.kill_host(second)
    try:
        wait_for_nothing_left(cluster)
        followed = care(cluster, "status", "--follow", str(job.run))
    finally:
        cluster.start_host(second)
    assert followed.code == 2
    assert f": host {second}: unreachable" in followed.error(), followed.output


@pytest.mark.matrix  # as one that starts
def test_a_cancelled_job_leaves_nothing(cluster: Cluster) -> None:
    with cluster.limit(SLOW):
        job = submit(cluster, "ssh", recipe(cluster, "cancel", steps=MANY), hosts(cluster), gpus=1)
        wait_for_step(job, 3)
        ended = care(cluster, "cancel", job.id)
        assert ended.code == 0, ended.output
        wait_for_nothing_left(cluster, seconds=5)
        assert "cancelled" in state(cluster, job)


@pytest.mark.matrix  # as the one that is cancelled with its supervisor
def test_a_job_is_cancelled_also_when_its_supervisor_was_killed(cluster: Cluster) -> None:
    file = recipe(cluster, "orphan", steps=MANY)
    job = submit(cluster, "openmpi", file, hosts(cluster), gpus=1)
    wait_for_step(job, 3)
    supervisors = with_word("launch.cluster.supervise", f"{job.run}/job")
    assert len(supervisors) == 1
    supervisors[0].kill()
    wait_until(lambda: "its supervisor was killed" in state(cluster, job), 20, "status tells")
    assert care(cluster, "cancel", str(job.run)).code == 0
    wait_for_nothing_left(cluster, seconds=5)
    assert not with_word(f"{job.run}/job/hostfile")


def with_word(*words: str) -> list[psutil.Process]:
    """The living processes that have all of these words in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if set(words) <= set(process.cmdline()):
                found.append(process)
    return found


AGAIN_STEPS = 60


@pytest.mark.matrix  # as near the time limit of a Slurm job
def test_a_job_that_is_asked_to_save_goes_on_when_submitted_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    values = recipe_values(cluster, steps=AGAIN_STEPS, checkpoint={"every": 0})
    file = write_yaml(cluster.folder / "hosts_again.yaml", values)
    # On a slow link no machine has done all steps before it is asked.
    with cluster.limit(SLOW):
        job = submit(cluster, "ssh", file, hosts(cluster))
        wait_for_step(job, 2)
        assert care(cluster, "cancel", job.id, "--save").code == 0
        stopped = care(cluster, "status", "--follow", job.id)
    assert stopped.code == 2
    assert "it was asked to save and end" in stopped.error()
    before = max(steps(job.run))
    assert before < AGAIN_STEPS
    again = submit(cluster, "ssh", file, hosts(cluster), "--set", f"run.dir={job.run}", "--follow")
    assert again.run == job.run
    assert any(f"resuming after step {before}" in log.read_text() for log in job.logs)
    whole = train_on_one_host(values, tmp_path / "whole")
    name = "model.safetensors"
    assert (job.run / name).read_bytes() == (whole / name).read_bytes()


MOMENTS = [pytest.param(kind, after) for after in (1.5, 0.0, 4.0) for kind in LAUNCHERS]


@pytest.mark.parametrize(
    ("kind", "seconds"), representatives(MOMENTS, lambda kind, seconds: {kind} & {"ssh"})
)
def test_a_job_is_cancelled_at_whatever_moment_of_its_start(
    cluster: Cluster, kind: str, seconds: float
) -> None:
    job = submit(cluster, kind, recipe(cluster, "early", steps=MANY), hosts(cluster), gpus=1)
    time.sleep(seconds)
    ended = care(cluster, "cancel", job.id)
    assert ended.code == 0, ended.output
    wait_for_nothing_left(cluster, seconds=5)
    assert not with_word(f"{job.run}/job/hostfile")
    time.sleep(3)  # what was on its way to a host would be there now
    wait_for_nothing_left(cluster, seconds=0.1)
    assert "cancelled" in state(cluster, job), state(cluster, job)


@pytest.mark.matrix  # as plain srun
def test_plain_mpirun_starts_one_world(cluster: Cluster, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "plain.yaml", recipe_values(cluster, steps=2))
    values = [f"run.dir={tmp_path}/run", "train.global_batch_size=4"]
    command = [
        "mpirun", "--allow-run-as-root", "-np", "2", "--oversubscribe", sys.executable,
        str(ROOT / "launch/train.py"), "--config", str(file), "--set", *values,
    ]  # fmt: skip
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23458"}
    rejected = cluster.run(command)
    assert rejected.code != 0
    assert (
        "MASTER_ADDR and MASTER_PORT not set: OpenMPI's mpirun does not say where"
        in rejected.output
    )
    done = cluster.run(command, env=env)
    assert done.code == 0, done.output
    assert "2 ranks = pipeline 1 x data 2 x tensor 1" in done.output
