"""Asked to stop, a run saves after the step at hand and ends; gone on with, it is the same run."""

import time
from pathlib import Path
from typing import Any

import pytest

from launch.config.load import recipe_from_dict
from tests.parity.planting import plant
from tests.ranks import run_ranks
from tests.resume.runs import STEPS, files, steps_logged, train, values, write_text

WENT_ON, APART = "went-on", "one rank saves, and the other trains"
ASKED_DURING_STEP = 3  # two steps are saved every second one: this is not one of them


def _train_and_ask(recipe: dict[str, Any], agree: bool) -> None:
    """Train; during a step somebody touches STOP. Without `agree`, each rank looks for itself."""
    import torch.distributed as dist

    import launch.train
    import launch.training.train_step

    stop = Path(recipe["run"]["dir"]) / "STOP"
    step, count = launch.training.train_step.train_step, iter(range(1, STEPS + 1))

    def interrupted(*arguments: Any) -> Any:
        number = next(count)
        if number > ASKED_DURING_STEP:
            stop.with_name(WENT_ON).touch()
        result = step(*arguments)
        if number == ASKED_DURING_STEP and dist.get_rank() == 0:
            stop.touch()
        return result

    vars(launch.training.train_step)["train_step"] = interrupted
    if not agree:
        _look_alone(stop)
    launch.train.train(recipe_from_dict(recipe), None)


def _look_alone(stop: Path) -> None:
    """Rank 0 alone sees that it is to stop, and tells when the other has gone on without it."""
    import launch.training.preemption
    from launch.checkpoint.save import Saver

    save = Saver.save

    def save_or_tell(*arguments: Any) -> None:
        if not stop.exists():
            save(*arguments)
            return
        while not stop.with_name(WENT_ON).exists():
            time.sleep(0.01)
        raise RuntimeError(APART)

    plant(Saver, "save", save_or_tell)
    vars(launch.training.preemption)["stop_requested"] = lambda run, ranks: (
        ranks.is_main and run.stop.exists()
    )


def recipe(folder: Path, run: str) -> dict[str, Any]:
    write_text(folder / "text")
    return values(folder, run, config="ds_configs/zero2.json", bf16={"enabled": False})


def test_a_stopped_run_ends_like_one_never_stopped(tmp_path: Path) -> None:
    whole, stopped = recipe(tmp_path, "whole"), recipe(tmp_path, "stopped")
    train(whole)
    run_ranks(_train_and_ask, 2, stopped, True)
    folder = tmp_path / "stopped"
    assert [r["step"] for r in steps_logged(folder) if "loss" in r] == [1, 2, 3]
    assert (folder / f"checkpoints/step_{ASKED_DURING_STEP:08d}").is_dir()
    assert not (folder / "STOP").exists(), "or the next start would stop at once"
    assert not (folder / "summary.json").exists(), "a run that has not finished must not say so"
    assert not (folder / "model.safetensors").exists()
    train(stopped, resume="auto")
    assert steps_logged(folder) == steps_logged(tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")
    assert (folder / "summary.json").exists()


def test_ranks_that_do_not_agree_are_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=APART):
        run_ranks(_train_and_ask, 2, recipe(tmp_path, "run"), False)
