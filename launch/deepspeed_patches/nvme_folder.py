"""Swap files on NVMe: two runs give theirs the same names."""

import contextlib
import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

from launch.ds_json.view import offload_blocks
from launch.errors import UserError


def with_own_swap_folder(ds_config: dict[str, Any], run: Path) -> tuple[dict[str, Any], list[Path]]:
    """The configuration with each `nvme_path` replaced by a folder below it, and those folders.

    Defect: DeepSpeed names swap files by stage, dtype, rank and parameter number. Two runs with one
        `nvme_path` overwrite each other's weights, and nothing tells of it.
    Versions: DeepSpeed 0.19.8.
    Workaround: give each run a folder, named after its run folder.
    Proof: test_nvme.py::test_two_runs_write_the_same_swap_files
    """
    config = copy.deepcopy(ds_config)
    name = f"{run.name}-{hashlib.blake2b(str(run.absolute()).encode(), digest_size=4).hexdigest()}"
    folders = []
    for offload in offload_blocks(config):
        if offload.get("device") == "nvme":
            offload["nvme_path"] = str(Path(offload["nvme_path"]) / name)
            folders.append(Path(offload["nvme_path"]))
    return config, sorted(set(folders))


def make_parents(ds_config: dict[str, Any]) -> None:
    """Make each `nvme_path`, so that one that cannot be made is told before ops are compiled.

    Part of the workaround `with_own_swap_folder`.

    Raises:
        UserError: where a folder cannot be made.
    """
    for offload in offload_blocks(ds_config):
        if offload.get("device") == "nvme":
            _make(Path(offload["nvme_path"]), Path(offload["nvme_path"]))


def _make(folder: Path, nvme_path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"zero_optimization: nvme_path {nvme_path} is not writable ({error.strerror}); "
            "set deepspeed.zero_optimization.offload_optimizer.nvme_path (and offload_param's)"
        ) from None


def make_empty(folders: list[Path]) -> None:
    """Make the folders, without what a killed run left in them. One rank on each host calls this.

    Part of the workaround `with_own_swap_folder`.

    Raises:
        UserError: where a folder cannot be made.
    """
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder, folder.parent)


def remove(folders: list[Path]) -> None:
    """Remove the folders at a run's end, and `nvme_path` with them where nothing else is in it.

    Part of the workaround `with_own_swap_folder`.
    """
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
