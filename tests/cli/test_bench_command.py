"""scripts/bench.py: both configurations train the same, and the ratios follow from what was timed."""

import json

import pytest

from launch.errors import UserError
from launch.paths import ROOT
from scripts import bench as command
from tests.ranks import forked_local_ranks

SMALL = [
    "train.global_batch_size=8", "train.micro_batch_size=2", "model.layers=2", "model.hidden=32",
    "data.sequence_length=32",
]  # fmt: skip


def arguments(*words: str) -> list[str]:
    recipe = str(ROOT / "recipes/gpt_tiny_zero2.yaml")
    return ["--config", recipe, "--ranks", "2", "--set", *SMALL, *words]


def test_all_train_the_same_in_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One device, the layer-wise baseline in one process, and the recipe's layout."""
    monkeypatch.setattr("launch.runtime.local_launcher.run_local_ranks", forked_local_ranks)
    words = ["--steps", "3", "--warmup", "1", "--rounds", "1", "--layerwise", "--json"]
    command.run(command.parse_arguments(arguments(*words)))
    found = json.loads(capsys.readouterr().out)
    plain, layerwise, layout = found["speeds"]
    assert (plain["ranks"], layout["ranks"]) == (1, 2)
    assert (layerwise["name"], layerwise["ranks"]) == ("layer-wise", 2)
    # All did the recipe's work: after four steps they have the same loss.
    assert layout["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-5)
    assert layerwise["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-6)
    for speed in (plain, layout):
        assert speed["tokens_per_second"] == pytest.approx(8 * 32 / speed["seconds_per_step"])
        assert speed["memory_gib"] > 0.1
        assert speed["mfu"] is None, "no peak is known of a CPU"
    ratio = layout["tokens_per_second"] / plain["tokens_per_second"]
    assert found["ratio_total"] == pytest.approx(ratio)
    assert found["ratio_per_rank"] == pytest.approx(ratio / 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--layerwise", "--ranks", "1"],
            "--layerwise: it spreads the layers of a family gpt",
        ),
        (
            ["--layerwise", "--ranks", "4"],
            "--layerwise: 4 devices are more than the model's 2",
        ),
        (["--steps", "0"], "--steps: 0 is too few; use 1 or more"),
        (["--ranks", "3"], "train.global_batch_size: 8 is no multiple of the data parallel"),
    ],
)
def test_it_refuses(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.run(command.parse_arguments(arguments(*words)))
