"""A save in the background holds the state of its step, whatever training does meanwhile."""

import time
from pathlib import Path
from typing import Any

from tests.parity.planting import plant
from tests.ranks import run_ranks
from tests.resume.layouts import BEFORE, recipe, same, saved, saver, whole_state
from tests.resume.runs import write_text

NAME = "stage 1, data 2"


def _save_both_ways(values: dict[str, Any], folder: Path) -> list[bool]:
    """Save, save in the background, and train on; whether the second was still being written then."""
    from launch.checkpoint import save
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    writing: list[bool] = []
    write = vars(save)["write_pieces"]

    def slow(pieces: Any, *rest: Any) -> None:
        time.sleep(0.5)
        write(pieces, *rest)
        writing.append(True)

    with local_engine(values, folder) as local:
        for step in range(BEFORE):
            train_step(local.engine, local.batch(step))
        saver(local, folder / "waited for").save(BEFORE)
        plant(save, "write_pieces", slow)
        behind = saver(local, folder / "behind", asynchronous=True)
        for number in range(2):  # the second uses the first one's memory again
            behind.save(BEFORE + number)
            train_step(local.engine, local.batch(BEFORE + number))
            writing.append(False)
            behind.finish()
            if number == 0:
                saver(local, folder / "waited for").save(BEFORE + 1)
    return writing


def test_it_is_the_state_of_its_step(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    (order, _) = run_ranks(_save_both_ways, 2, recipe(tmp_path, NAME), tmp_path)
    # Trained a step before it was written; the save between is written after the first.
    assert order == [False, True, True, False, True]
    for step in (BEFORE, BEFORE + 1):
        folders = [
            saved(tmp_path / way).with_name(f"step_{step:08d}") for way in ("waited for", "behind")
        ]
        assert same(*map(whole_state, folders)), step


def _save_with_a_defect(values: dict[str, Any], folder: Path) -> str:
    """What `finish` raises when the thread that writes has met an error that nobody expected."""
    from launch.checkpoint import save
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect of ours")

    plant(save, "write_pieces", broken)
    with local_engine(values, folder) as local:
        train_step(local.engine, local.batch(0))
        behind = saver(local, folder, asynchronous=True)
        behind.save(1)
        try:
            behind.finish()
        except ZeroDivisionError as error:
            return str(error)
    return "nothing"


def test_an_error_of_the_thread_ends_the_run(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    found = run_ranks(_save_with_a_defect, 2, recipe(tmp_path, NAME), tmp_path)
    assert found == ["a defect of ours"] * 2
