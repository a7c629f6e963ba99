"""scripts/compare_memory.py: the prediction stands beside what was measured."""

import json
from pathlib import Path

import pytest

from launch.errors import UserError
from launch.paths import ROOT
from scripts import compare_memory as command

RECIPE = str(ROOT / "recipes/gpt_tiny_zero1.yaml")
SMALL = ["--set", "model.layers=2", "data.sequence_length=64", "train.global_batch_size=8"]


def run(*words: str) -> None:
    command.run(command.parse_arguments(["--config", RECIPE, "--ranks", "2", *words, *SMALL]))


def test_the_prediction_is_near_what_two_ranks_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "memory.png"
    run("--only", "ZeRO-1", "--steps", "3", "--json", "--picture", str(picture))
    printed = capsys.readouterr().out
    (row,) = json.loads(printed[printed.index("[\n") :])
    assert row["method"] == "ZeRO-1" and row["tokens_per_second"] > 0
    assert row["measured_bytes"] / 2**30 == pytest.approx(row["predicted_gib"], rel=0.05)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "2"], "--steps: 2 leaves none to time; use 3 or more"),
        (["--only", "ZeRO-9"], "--only: no method for 2 ranks has 'ZeRO-9' in its name"),
    ],
)
def test_it_refuses_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words)
