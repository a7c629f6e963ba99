"""scripts/submit.py before a cluster has the job: what it renders, rejects and remembers."""

import os
from pathlib import Path

import pytest
import yaml

from launch.cluster.backend import MODULES
from launch.config.load import load_recipe
from launch.paths import ROOT
from tests.cli.commands import Ended, run_forked

RECIPE = "recipes/gpt_tiny_zero2.yaml"
SITE = """
slurm: {partition: gpu}
hosts: {hosts: [first, second]}
kubernetes: {image: registry.example/train:1, claim: runs}
skypilot: {accelerators: H100, bucket: s3://runs, image: "docker:registry.example/train:1"}
"""


def submit(
    *words: str | Path, site: Path | None = None, env: dict[str, str] | None = None
) -> Ended:
    of_site = ("--site", site) if site else ()
    return run_forked([ROOT / "scripts/submit.py", *words, *of_site], env)


def dry_run(cluster: str, site: Path, *words: str, nodes: int = 2, gpus: int = 1) -> Ended:
    return submit(
        "--recipe", RECIPE, "--cluster", cluster, "--nodes", str(nodes), "--gpus-per-node",
        str(gpus), "--dry-run", *words, site=site,
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text(SITE)
    return file


@pytest.mark.parametrize("cluster", MODULES)
def test_a_dry_run_shows_each_file_and_writes_none(cluster: str, site: Path) -> None:
    runs = ROOT / "runs" / Path(RECIPE).stem
    before = sorted(runs.rglob("*"))
    done = dry_run(cluster, site, "--set", "train.steps=7")
    assert done.code == 0, done.output
    assert "2 ranks = pipeline 1 x data 2 x tensor 1" in done.output
    assert "steps: 7" in done.output
    assert "##### " in done.output
    assert "deepspeed" in done.output
    assert sorted(runs.rglob("*")) == before


def test_overrides_reach_the_job_recipe_unharmed(site: Path, tmp_path: Path) -> None:
    awkward = """a 'single' "double" $HOME `date` \\ %h #!"""
    done = dry_run("slurm", site, "--set", f"run.sample_prompt={yaml.safe_dump(awkward)}")
    assert done.code == 0, done.output
    text = done.output.split(f"{Path(RECIPE).name}\n")[-1].split("\n2 nodes of 1")[0]
    file = tmp_path / "gpt_tiny_zero2.yaml"
    file.write_text(text)
    recipe = load_recipe(file)
    assert recipe.run.sample_prompt == awkward
    assert recipe.run.dir is not None and "runs/gpt_tiny_zero2/" in recipe.run.dir
    # Nothing else has changed.
    plain = load_recipe(RECIPE)
    assert recipe.model_copy(update={"run": plain.run}) == plain


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "0"], "--nodes: 0 is too few"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: -1 is too few"),
        (["--recipe", "recipes/gpt_tiny_zero9.yaml"], "did you mean 'gpt_tiny_zero"),
        (["--set", "parallel.tensor=3"], "parallel"),
        (["--set", "trian.steps=3"], "unknown key trian"),
        (["--nodes", "3"], "train.global_batch_size"),
    ],
    ids=["no nodes", "no GPUs", "no recipe", "layout", "key", "batch"],
)
def test_a_mistake_is_told_in_a_line(words: list[str], expected: str, site: Path) -> None:
    done = dry_run("slurm", site, *words)
    assert done.code == 2
    assert expected in done.error()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slurm: {partitoin: gpu}", "slurm.partitoin: unknown key"),
        ("port: 80", "port: "),
        ("environment: {FLAG: true}", "environment: put true and false between quotes"),
        ("environment: {'A B': x}", "environment.A B"),
        ("slurm: [", "not readable as YAML"),
        ("- a list", "a site is a mapping"),
    ],
)
def test_a_bad_site_is_told_in_a_line(text: str, expected: str, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(text)
    done = dry_run("slurm", site)
    assert done.code == 2
    assert expected in done.error()


def to_slurm(site: Path, env: dict[str, str]) -> str:
    words = ["--recipe", RECIPE, "--cluster", "slurm", "--nodes", "2", "--gpus-per-node", "1"]
    done = submit(*words, site=site, env=env)
    assert done.code == 2
    return done.error()


def test_a_slurm_that_does_not_answer_is_told(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "slurm.conf"
    host = "SlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\nNodeName=n\n"
    file.write_text(f"ClusterName=x\n{host}")
    assert "the Slurm controller does not answer" in to_slurm(site, {"SLURM_CONF": str(file)})


def test_a_machine_of_no_slurm_cluster_is_told(site: Path, tmp_path: Path) -> None:
    # What sinfo 22.05 says without a slurm.conf; this machine may have one.
    said = "sinfo: fatal: Could not establish a configuration source"
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "sinfo").chmod(0o755)
    told = to_slurm(site, {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert "this machine belongs to no Slurm cluster; submit from a login node" in told


def test_what_a_person_should_know_is_noted(site: Path) -> None:
    done = dry_run("slurm", site, "--set", "parallel.tensor=2", nodes=2, gpus=1)
    assert "note: tensor parallel size 2 is larger than the 1 GPUs of a node" in done.output
    assert "note: checkpoint.every is 0" in done.output


def test_a_job_that_nobody_knows(tmp_path: Path) -> None:
    for verb in ("status", "cancel"):
        done = submit(verb, tmp_path / "nothing")
        assert done.code == 2
        assert "no such job" in done.error()
