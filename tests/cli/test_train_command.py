"""The entry as a person starts it: under each launcher and without one, and what it says of itself."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.paths import ROOT
from launch.runtime.local_launcher import free_port
from launch.runtime.run_dir import read_metrics
from tests.cli.commands import OF_A_RANK, train_forked

MATRIX = pytest.mark.matrix
RECIPE = "recipes/gpt_tiny_zero2.yaml"
ENTRY = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
STEPS = 4
SMALL = [
    f"train.steps={STEPS}", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.eval_every=0", "train.eval_batches=1", "model.layers=2", "model.hidden=32",
    "data.sequence_length=32", "run.sample_tokens=3", "run.tensorboard=false",
]  # fmt: skip


def command(*words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the PATH, and `more` variables."""
    env = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
    env |= {"PATH": f"{BIN}{os.pathsep}{env.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
    # A terminal's width must not decide what the tables hold.
    env |= {"COLUMNS": "200", "NO_COLOR": "1", **more}
    return subprocess.run(
        words, cwd=cwd, env=env, capture_output=True, text=True, timeout=1000, check=False
    )


def deepspeed() -> list[str]:
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]


def torchrun() -> list[str]:
    return ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]


def accelerate() -> list[str]:
    # On a CPU too: --cpu would start one process, and more only through MPI.
    return [
        "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
    ]  # fmt: skip


def plain() -> list[str]:
    return ["python"]


LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "accelerate": accelerate,
    "python": plain,
}


class Launched(NamedTuple):
    """What a launcher's command printed, its run folder, and Python's list of what was imported."""

    said: str
    folder: Path
    imported: str


Run = Callable[[str], Launched]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe's run under a launcher, from a working directory that is not the checkout."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    @functools.cache
    def under(launcher: str) -> Launched:
        settings = [part for change in SMALL for part in ("--set", change)]
        done = command(
            *LAUNCHERS[launcher](), ENTRY, "--config", str(ROOT / RECIPE), *settings, "--set",
            f"run.dir={launcher}", cwd=elsewhere, PYTHONPROFILEIMPORTTIME="1",
        )  # fmt: skip
        assert done.returncode == 0, f"{launcher}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return Launched(done.stdout, elsewhere / launcher, done.stderr)

    return under


def numbers(folder: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=MATRIX)])
def test_launchers_give_the_same_run(run: Run, launcher: str) -> None:
    expected, found = run("deepspeed").folder, run(launcher).folder
    assert len(numbers(expected, "loss")) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert numbers(found, key) == numbers(expected, key)
    weights = (folder / "model.safetensors" for folder in (expected, found))
    assert len({file.read_bytes() for file in weights}) == 1


def test_a_run_that_compiles_nothing_does_not_load_torchs_compiler(run: Run) -> None:
    """That takes each rank 2 s."""
    imported = re.findall(r"^import time:.*\| +([\w.]+)$", run("deepspeed").imported, re.M)
    assert "deepspeed.runtime.engine" in imported
    assert "torch._dynamo" not in imported


@pytest.mark.matrix  # as parity
def test_one_device_gives_the_same_losses(run: Run) -> None:
    expected, found = run("deepspeed").folder, run("python").folder
    for key in ("loss", "grad_norm"):
        assert numbers(found, key) == pytest.approx(numbers(expected, key), rel=1e-5)


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(each, marks=() if each == "deepspeed" else MATRIX) for each in LAUNCHERS],
)
def test_a_run_says_where_it_went(run: Run, launcher: str) -> None:
    said, folder, _ = run(launcher)
    ranks, accumulation = (1, 4) if launcher == "python" else (2, 2)
    assert (
        f"{ranks} ranks = pipeline 1 x data {ranks} x tensor 1; global batch 8 = data {ranks} "
        f"x accumulation {accumulation} x micro batch 2"
    ) in said
    for text in ("validation loss: ", "loss curve: ", f"step {STEPS}/{STEPS}: loss "):
        assert said.count(text) == 1, f"{text!r} is told once, by rank 0"
    # `run.dir` was relative to where the command was started.
    assert re.search(rf"^run folder: .*{folder.name}$", said, re.M)
    files = {file.name for file in folder.iterdir()}
    assert files >= {
        "recipe.yaml", "deepspeed.json", "environment.json", "metrics.jsonl", "model.safetensors",
        "loss.png", "sample.txt", "summary.json",
    }  # fmt: skip


def test_help_reads_well() -> None:
    done = command("python", ENTRY, "--help")
    assert done.returncode == 0
    for flag in ("--config RECIPE", "--set KEY=VALUE", "--resume PATH|auto", "--list", "--dry-run"):
        assert flag in done.stdout
    assert "deepspeed --num_gpus 2 launch/train.py --config recipes/" in done.stdout
    assert "local_rank" not in done.stdout, "the launcher's own argument is none of a person's"


def test_without_arguments_it_says_what_to_give() -> None:
    done = command("python", ENTRY)
    assert done.returncode == 2
    assert "give --config RECIPE, or --list to see the recipes" in done.stderr


def test_list_shows_every_recipe() -> None:
    done = command("python", ENTRY, "--list")
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "recipes").glob("*.yaml"):
        assert file.stem in done.stdout
    line = next(x for x in done.stdout.splitlines() if x.lstrip().startswith("gpt_1b3_zero1 "))
    assert re.search(r"1\.32B +zero1 .*GPUs of 80 GiB", line)


def test_dry_run_says_what_would_run(tmp_path: Path) -> None:
    done = command(
        "python", ENTRY, "--config", str(ROOT / "recipes/gpt_6b7_zero3.yaml"), "--dry-run",
        "--ranks", "8", "--set", "train.steps=10", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for fact in (
        "parameters: 6,658,596,864 (6.66B)",
        "layout: 8 ranks = pipeline 1 x data 8 x tensor 1; global batch 1024 = ",
        "  steps: 10",
        '"stage": 3',
        '"train_batch_size": 1024',
    ):
        assert fact in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_dry_run_under_a_launcher_counts_its_ranks_and_speaks_once() -> None:
    done = train_forked(RECIPE, ranks=2, words=["--dry-run"])
    assert done.code == 0, done.output
    assert done.output.count("layout: 2 ranks = ") == 1
