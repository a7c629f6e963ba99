"""Which checkpoint a run resumes from, and which it rejects."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint import resume
from launch.checkpoint.identity import check, identity
from launch.checkpoint.manifest import FORMAT, MANIFEST
from launch.checkpoint.resume import choose_start
from launch.config.layout import plan_layout
from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.runtime.run_dir import RunDir, lock_run_dir, new_folder
from tests.resume.runs import steps_logged, train, values, write_text

# What `printf 12345678 | sha256sum` prints.
SHA256 = "ef797c8118f02dfb649607dd5d3f8c7623048c9c063d532cc95c5ed7a898a64f"
ZERO1: dict[str, Any] = {"config": "ds_configs/zero1.json", "bf16": {"enabled": False}}


def _recipe(folder: Path, **run: Any) -> Recipe:
    plain = values(folder, **ZERO1)
    return recipe_from_dict({**plain, "run": {**plain["run"], **run}})


def _saved(run: Path, *steps: int) -> list[Path]:
    made = []
    run.mkdir(parents=True, exist_ok=True)
    for step in steps:
        folder = run / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights.pt").write_bytes(b"12345678")
        files = {"weights.pt": {"bytes": 8, "sha256": SHA256}}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        made.append(folder)
    (run / "metrics.jsonl").touch()
    return made


def test_auto_takes_the_newest(tmp_path: Path) -> None:
    saved = _saved(tmp_path / "run", 2, 10, 4)
    start = choose_start(_recipe(tmp_path), "auto")
    assert start.checkpoint == saved[1]
    assert start.message == f"resuming after step 10 from {saved[1]}"


def test_auto_without_a_run_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    start = choose_start(_recipe(tmp_path), "auto")
    assert start.checkpoint is None
    assert "no complete checkpoint under" in start.message
    assert f"starting at step 0 in {tmp_path / 'run'}" in start.message


def test_auto_tells_of_a_save_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/.saving_00000002").mkdir(parents=True)
    start = choose_start(_recipe(tmp_path), "auto")
    assert start.checkpoint is None
    assert ".saving_00000002" in start.message


def test_auto_passes_over_a_save_that_was_cut_short(tmp_path: Path) -> None:
    saved = _saved(tmp_path / "run", 2)
    (tmp_path / "run/checkpoints/.saving_00000004").mkdir()
    assert choose_start(_recipe(tmp_path), "auto").checkpoint == saved[0]


@pytest.mark.parametrize(
    "damage", ["truncated", "missing", "one bit", "manifest", "empty manifest", "no file", "old"]
)
def test_auto_passes_over_a_damaged_one_and_says_so(damage: str, tmp_path: Path) -> None:
    older, newer = _saved(tmp_path / "run", 2, 4)
    if damage == "truncated":
        (newer / "weights.pt").write_bytes(b"1234")
    elif damage == "one bit":
        (newer / "weights.pt").write_bytes(b"12345679")
    elif damage == "missing":
        (newer / "weights.pt").unlink()
    elif damage == "no file":
        (newer / MANIFEST).unlink()
    else:
        texts = {
            "manifest": '{"step": 4, ',
            "empty manifest": "{}",
            "old": '{"step": 4, "files": {}}',
        }
        (newer / MANIFEST).write_text(texts[damage])
    start = choose_start(_recipe(tmp_path), "auto")
    assert start.checkpoint == older
    assert "passed over step_00000004" in start.message
    with pytest.raises(
        UserError, match=rf"is not a complete .*; the newest complete one is {older}"
    ):
        choose_start(_recipe(tmp_path), str(newer))


@pytest.mark.parametrize("resume", ["auto", "run"])
def test_all_damaged_is_no_restart_from_step_0(resume: str, tmp_path: Path) -> None:
    for folder in _saved(tmp_path / "run", 2, 4):
        (folder / "weights.pt").write_bytes(b"")
    path = resume if resume == "auto" else str(tmp_path / "run")
    with pytest.raises(UserError, match=r"step_00000004.*0 bytes instead of 8.*step_00000002"):
        choose_start(_recipe(tmp_path), path)


def test_a_path_names_a_run_or_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = _saved(tmp_path / "run", 2, 4)
    monkeypatch.chdir(older.parent)
    for path, expected in (
        (str(tmp_path / "run"), newer),
        (str(older) + "/", older),
        ("step_00000002", older),
        ("..", newer),
    ):
        start = choose_start(_recipe(tmp_path, dir=None), path)
        assert start.checkpoint is not None
        assert start.checkpoint.resolve() == expected
        assert start.folder.path.resolve() == tmp_path / "run"


def test_a_wrong_path_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume: there is no folder .*nowhere"):
        choose_start(_recipe(tmp_path), str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        choose_start(_recipe(tmp_path), str(tmp_path))
    _saved(tmp_path / "other", 2)
    with pytest.raises(UserError, match=r"run.dir is .*leave one of the two out"):
        choose_start(_recipe(tmp_path), str(tmp_path / "other"))


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    _saved(tmp_path / "run", 2)
    with pytest.raises(UserError, match=r"already holds a run; .*--resume auto"):
        choose_start(_recipe(tmp_path), None)


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "ROOT", tmp_path)
    starts = [choose_start(_recipe(tmp_path, dir=None), None) for _ in range(3)]
    folders = {start.folder.path for start in starts}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "runs/resumed"}


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()  # a file, in the way
    with pytest.raises(
        UserError, match=r"run\.dir: cannot make a folder in .* name a writable one"
    ):
        new_folder(tmp_path / "runs")


def test_auto_looks_through_the_recipes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "ROOT", tmp_path)
    runs = tmp_path / "runs/resumed"
    saved = _saved(runs / "20260101-000000", 2)
    _saved(runs / "20260102-000000")
    start = choose_start(_recipe(tmp_path, dir=None), "auto")
    assert start.checkpoint == saved[0]
    assert "passed over 20260102-000000: no checkpoint" in start.message


def test_run_dir_is_relative_to_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_start(_recipe(tmp_path, dir="here"), None).folder.path == tmp_path / "here"


def test_two_processes_do_not_write_to_one_run(tmp_path: Path) -> None:
    lock = lock_run_dir(RunDir(tmp_path / "run"))
    with pytest.raises(UserError, match="a run that has not ended"):
        lock_run_dir(RunDir(tmp_path / "run"))
    lock.release()
    lock_run_dir(RunDir(tmp_path / "run")).release()


CHANGED: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "run.dir": ({"run": {"dir": "elsewhere"}}, None),
    "train.steps": ({"train": {"steps": 9}}, None),
    "fewer steps than are done": ({"train": {"steps": 1}}, "past train.steps=1"),
    "seed": ({"train": {"seed": 5}}, "train.seed was 1234 and is 5"),
    "dropout": ({"model": {"dropout": 0.3}}, r"model.dropout was 0.2 and is 0.3"),
    "schedule": ({"train": {"schedule": {"warmup_steps": 1}}}, "train.schedule.warmup_steps"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_recipe_is_rejected_by_the_key(change: str, tmp_path: Path) -> None:
    changes, rejected = CHANGED[change]
    saved = _checkpoint(tmp_path, _recipe(tmp_path))
    plain = values(tmp_path, **ZERO1)
    now = recipe_from_dict(
        {**plain, **{block: {**plain[block], **new} for block, new in changes.items()}}
    )
    _check(saved, _identity(now), now.train.steps, rejected)


@pytest.mark.parametrize(
    ("other", "rejected"),
    [
        ({"corpus": "b"}, "training text is not the one"),
        ({"json": {"a": {"lr": 2}}}, r"deepspeed.a.lr was 1 and is 2"),
    ],
)
def test_another_world_is_rejected(other: dict[str, Any], rejected: str, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    saved = _checkpoint(tmp_path, recipe)
    _check(saved, _identity(recipe, **other), recipe.train.steps, rejected)


def _identity(
    recipe: Recipe, ranks: int = 1, corpus: str = "a", json: dict[str, Any] | None = None
) -> dict[str, Any]:
    ds_config = {"a": {"lr": 1}, "train_batch_size": ranks} if json is None else json
    return identity(recipe, ds_config, plan_layout(recipe, ranks), corpus)


def _checkpoint(folder: Path, recipe: Recipe) -> Path:
    (saved,) = _saved(folder / "run", 2)
    manifest = {"format": FORMAT, "step": 2, **_identity(recipe), "files": {}}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    return saved


def _check(saved: Path, run: dict[str, Any], steps: int, rejected: str | None) -> None:
    if rejected is None:
        assert check(saved, run, steps) == (2, None)
        return
    with pytest.raises(UserError, match=rejected):
        check(saved, run, steps)


def test_a_finished_run_and_more_steps(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    recipe = values(tmp_path, **ZERO1)
    train(recipe, ranks=1)
    run = tmp_path / "run"
    assert [p.name for p in sorted((run / "checkpoints").glob("step_*"))] == [
        "step_00000004",
        "step_00000005",
    ]
    before, weights = steps_logged(run), (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    train(recipe, resume="auto", ranks=1)  # nothing is left to train: it ends as it did
    assert steps_logged(run) == before
    assert (run / "model.safetensors").read_bytes() == weights

    recipe["train"]["steps"] = 7
    train(recipe, resume=str(run / "checkpoints/step_00000004"), ranks=1)
    steps = [record for record in steps_logged(run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6, 7]
    # A cosine from 1e-2 after step 4 to 1e-3 at step 7, and not at once the end of the shorter one.
    rates = [0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 3))) for i in (1, 2, 3)]
    assert [record["learning_rate"] for record in steps[4:]] == pytest.approx(rates)
    assert [p.name for p in sorted((run / "checkpoints").glob("step_*"))] == [
        "step_00000006",
        "step_00000007",
    ]
    earlier = json.loads((run / "environment.json").read_text())["earlier"]
    assert len(earlier) == 2
