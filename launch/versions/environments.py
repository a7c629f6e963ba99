"""Released versions of DeepSpeed, each installed into a folder of its own beside the present torch.

A folder holds what `pip install --no-deps --target` puts there, and comes before the virtual
environment on the worker's PYTHONPATH. torch, numpy and pydantic are the environment's, the same for
all: what differs between two columns of the table is DeepSpeed alone. No op is compiled; the probes
need none.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch.errors import UserError
from launch.paths import ROOT

FOLDER = ROOT / ".cache" / "versions"
Done = subprocess.CompletedProcess[str]
_RELEASE = re.compile(r"\d+(\.\d+)+$")


def as_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: "0.18.3" is (0, 18, 3).

    Raises:
        UserError: if it is no plain release.
    """
    if not _RELEASE.match(version):
        raise UserError(f"'{version}' is no version of DeepSpeed; write it as 0.18.3")
    return tuple(int(part) for part in version.split("."))


def released(first: str) -> list[str]:
    """The releases that pip finds, from `first` to the newest, in order.

    Raises:
        UserError: if pip finds none, or no index.
    """
    oldest = as_numbers(first)
    done = _pip("index", "versions", "deepspeed")
    found = re.search(r"Available versions: (.*)", done.stdout)
    if done.returncode or not found:
        raise UserError(
            f"pip lists no versions of DeepSpeed: {_last_line(done)}; name them with --only"
        )
    names = [name.strip() for name in found[1].split(",")]
    versions = sorted((name for name in names if _RELEASE.match(name)), key=as_numbers)
    later = [name for name in versions if as_numbers(name) >= oldest]
    if not later:
        raise UserError(f"--from {first}: the newest version that pip finds is {versions[-1]}")
    return later


def install(version: str) -> Path:
    """The folder with this version, downloaded and installed unless it is there.

    Raises:
        UserError: if pip cannot install it.
    """
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    part = FOLDER / f"{version}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    done = _pip(
        "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(part),
        f"deepspeed=={version}",
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"pip cannot install deepspeed=={version}: {_last_line(done)}")
    part.rename(folder)
    return folder


def worker_environment(folder: Path) -> dict[str, str]:
    """Environment variables of a worker that imports DeepSpeed from `folder`."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def check(about: dict[str, str], version: str, folder: Path) -> None:
    """Check what a worker says of itself: it has imported the DeepSpeed that it was to import.

    Raises:
        UserError: if it is another version, or lies elsewhere.
    """
    inside = Path(about["file"]).resolve().is_relative_to(folder.resolve())
    if about["deepspeed"] != version or not inside:
        raise UserError(
            f"{folder} was to give DeepSpeed {version}, and python imported {about['deepspeed']} from "
            f"{about['file']}; remove the folder"
        )


def _pip(*words: str) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        env={**os.environ, "DS_BUILD_OPS": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _last_line(done: Done) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return lines[0].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
