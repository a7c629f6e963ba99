"""kill -9 at every phase of a save: what is there is whole, and the resumed run ends with the same bits."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint.manifest import find_damage, newest_complete
from launch.config.load import recipe_from_dict
from launch.runtime.run_dir import RunDir
from tests.parity.planting import plant
from tests.ranks import RankDiedError, run_ranks
from tests.resume.runs import STEPS, files, steps_logged, train, values, write_text
from tests.selection import representatives

# Saves are of steps 2, 4 and 5, and each makes the one before it superfluous. The second is hit.
HIT = 2


def _die_in(owner: Any, name: str, call: int, after: bool = False) -> None:
    """Kill this rank in a save's `call`-th call of a function, before or after it."""
    right, count = getattr(owner, name), iter(range(1, 10**9))

    def deadly(*arguments: Any, **named: Any) -> Any:
        last = next(count) == call
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = right(*arguments, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    plant(owner, name, deadly)


def _die_removing(half: bool) -> None:
    """Kill this rank when it removes an old checkpoint: before it, or when one file is gone."""

    def deadly(folder: Path, **_: Any) -> None:
        if not list(folder.glob("*")):
            return
        if half:
            next(iter(folder.glob("state_*"))).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    plant(shutil, "rmtree", deadly)


# By name: the rank that dies, how, and the step of the newest complete checkpoint afterwards.
Phase = tuple[int, Callable[[], None], int]


def phases() -> dict[str, Phase]:
    import torch.distributed as dist

    from launch.checkpoint import folder, pieces, save

    return {
        "before the folder is made": (0, lambda: _die_in(save, "prepare", HIT), 2),
        "after the folder is made": (0, lambda: _die_in(save, "prepare", HIT, after=True), 2),
        "before its file is written": (1, lambda: _die_in(pieces, "save_file", HIT), 2),
        "after its file is written": (1, lambda: _die_in(pieces, "save_file", HIT, after=True), 2),
        "in the middle of its file": (1, lambda: plant(pieces, "save_file", _write_half), 2),
        "before the others are told": (1, lambda: _die_in(dist, "gather_object", HIT), 2),
        "when all have written": (0, lambda: _die_in(save, "commit", HIT), 2),
        "before the manifest is written": (0, lambda: _die_in(folder, "_write", 2 * HIT - 1), 2),
        "in the middle of the manifest": (0, lambda: plant(folder, "_write", _half_manifest), 2),
        "before it gets its name": (0, lambda: _die_in(Path, "rename", HIT), 2),
        "after it got its name": (0, lambda: _die_in(Path, "rename", HIT, after=True), 4),
        "before latest names it": (0, lambda: _die_in(folder, "_write", 2 * HIT), 4),
        "before the old one is removed": (0, lambda: _die_removing(half=False), 4),
        "in the middle of the removal": (0, lambda: _die_removing(half=True), 4),
        "after it has committed": (0, lambda: _die_in(save, "commit", HIT, after=True), 4),
    }  # fmt: skip


_written = iter(range(1, 10**9))


def _write_half(tensors: Any, file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file)
    if next(_written) == HIT:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _half_manifest(file: Path, text: str) -> None:
    file.write_text(text)
    if "manifest" in file.name and next(_written) == HIT:
        file.write_text(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


def _recipe(folder: Path, run: str, asynchronous: bool) -> dict[str, Any]:
    found = values(folder, run, config="ds_configs/zero2.json", bf16={"enabled": False})
    found["checkpoint"] = {"every": 2, "keep": 1, "asynchronous": asynchronous}
    return found


def _train(recipe: dict[str, Any], phase: str) -> None:
    import launch.train

    rank, die, _ = phases()[phase]
    if rank == int(os.environ["RANK"]):
        die()
    launch.train.train(recipe_from_dict(recipe), None)


def _kinds(phase: str, asynchronous: bool) -> set[str]:
    """Where a save is cut short, and how it was made."""
    return {phase.split()[-1] if "middle" in phase else "between", f"asynchronous {asynchronous}"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has killed."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text")
    train(_recipe(folder, "run", asynchronous=False))
    return folder


@pytest.mark.parametrize(
    ("phase", "asynchronous"),
    representatives(
        [
            pytest.param(
                phase, wait, id=f"{phase}, {'in the background' if wait else 'waited for'}"
            )
            for phase in phases()
            for wait in (False, True)
        ],
        _kinds,
    ),
)
def test_a_save_cut_short_costs_no_more_than_the_steps_since_the_last(
    phase: str, asynchronous: bool, whole: Path, tmp_path: Path
) -> None:
    recipe = _recipe(whole, "unused", asynchronous)
    recipe["run"]["dir"] = str(tmp_path / "run")
    # The one that dies, or the one that misses it first.
    with pytest.raises(
        (RankDiedError, RuntimeError), match=r"-9|Connection (closed|reset)|Broken pipe"
    ):
        run_ranks(_train, 2, recipe, phase)
    run = RunDir(tmp_path / "run")
    newest, _ = newest_complete(run)
    for folder in run.checkpoints.glob("step_*"):
        assert find_damage(folder) is None, "a folder with a checkpoint's name must be whole"
    assert newest is not None
    assert newest.name == f"step_{phases()[phase][2]:08d}"
    left_over = [path.name for path in run.checkpoints.glob(".*_*")]

    said = run_ranks(_resume, 2, recipe)[0]
    assert f"resuming after step {phases()[phase][2]} from {newest}" in said
    assert all(f"{name}: cut short" in said for name in left_over)
    assert steps_logged(run.path) == steps_logged(whole / "run")
    assert files(run.path) == files(whole / "run")
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["latest", f"step_{STEPS:08d}"]
    assert (run.checkpoints / "latest").read_text() == f"step_{STEPS:08d}\n"


def _resume(recipe: dict[str, Any]) -> str:
    import launch.train

    said: list[str] = []
    plant(launch.train, "say", said.append)
    launch.train.train(recipe_from_dict(recipe), "auto")
    return "\n".join(said)
