"""The layout of a run folder.

runs/<recipe>/<time>/
    recipe.yaml        the resolved recipe
    deepspeed.json     the resolved configuration
    environment.json   versions, devices, commit, command; also of earlier starts
    metrics.jsonl      one object per step
    tensorboard/       the same, for TensorBoard
    checkpoints/step_00000500/ ...
    model.safetensors  the final weights
    loss.png, sample.txt, summary.json
    job/               files of scripts/submit.py: scripts, the recipe, one log per rank
    STOP               touch this to make the run save and stop
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.locks import acquire


@dataclass(frozen=True)
class RunDir:
    """Paths in a run folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder with one subfolder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def stop(self) -> Path:
        """Touch this file to make the run save and stop (`launch/training/preemption.py`)."""
        return self.path / "STOP"

    @property
    def summary(self) -> Path:
        """The results; exists only after the run has finished."""
        return self.path / "summary.json"


def new_folder(parent: Path) -> Path:
    """Create a folder named after the current time in `parent`, unique even within a second.

    Raises:
        UserError: if it cannot be created, for example in a checkout that is not ours to write to.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, number = parent / stamp, 1
    while True:
        try:
            path.mkdir(parents=True)  # claims the name: another run may start in the same second
        except FileExistsError:
            path, number = parent / f"{stamp}-{number}", number + 1
        except OSError as error:
            raise UserError(
                f"run.dir: cannot make a folder in {parent} ({error.strerror}); name a writable one"
            ) from None
        else:
            return path


def lock_run_dir(run: RunDir) -> FileLock:
    """Create the run folder and lock out other processes while this one lives.

    Raises:
        UserError: if it cannot be created or written to, or another run is writing to it.
    """
    lock = FileLock(run.path / ".lock")  # the kernel releases it when its holder dies
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        acquire(lock, timeout=0)
    except Timeout:
        raise UserError(
            f"run.dir: a run that has not ended is writing to {run.path}; wait for it, or name "
            "another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write to {run.path}, or lock it ({error.strerror}); name a writable "
            "folder on a disk with locks"
        ) from None
    return lock


def write_settings(run: RunDir, recipe: Recipe, ds_config: dict[str, Any], world_size: int) -> None:
    """Write recipe.yaml, deepspeed.json and environment.json, which also keeps earlier starts."""
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    (run.path / "deepspeed.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    file, now = run.path / "environment.json", environment(world_size)
    try:
        before = json.loads(file.read_text())
        now["earlier"] = [*before.pop("earlier", []), before]
    except (OSError, ValueError):
        now["earlier"] = []
    file.write_text(json.dumps(now, indent=2) + "\n")


def read_settings(folder: Path) -> Recipe:
    """Read the resolved recipe of a run folder.

    Raises:
        UserError: if the folder is not a run folder.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: not a run folder, it has no recipe.yaml")
    return recipe_from_dict(yaml.safe_load(file.read_text()), where=str(file))


def newest_finished(path: Path) -> Path:
    """The run folder at `path`, or the newest finished run in it if it is `runs/<recipe>`.

    Raises:
        UserError: if it is neither.
    """
    if (path / "recipe.yaml").is_file():
        return path
    finished = sorted(path.glob("*/model*.safetensors"))
    if not finished:
        raise UserError(f"{path}: neither a run folder nor a folder with finished runs")
    return finished[-1].parent


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl; a truncated last line is ignored."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def environment(world_size: int) -> dict[str, Any]:
    """The information needed to reproduce a run: versions, devices, commit, command."""
    import torch

    packages = ("torch", "deepspeed", "transformers", "datasets", "accelerate")
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "world_size": world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain", "--untracked-files=no"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What a git command prints in the checkout; None if it fails, or there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
