"""scripts/bench.py: both configurations train the same, and the ratios follow from what was timed."""

import json
import subprocess
import sys

import pytest

from launch.paths import ROOT

SMALL = [
    "train.global_batch_size=8", "train.micro_batch_size=2", "model.layers=2", "model.hidden=32",
    "data.sequence_length=32",
]  # fmt: skip


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, str(ROOT / "scripts/bench.py"), "--config",
        str(ROOT / "recipes/gpt_tiny_zero2.yaml"), "--ranks", "2", "--set", *SMALL, *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)


def test_it_compares_in_one_run() -> None:
    done = bench("--steps", "3", "--warmup", "1", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, layout = found["speeds"]
    assert (plain["ranks"], layout["ranks"]) == (1, 2)
    # Both did the recipe's work: after four steps they have the same loss.
    assert layout["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-5)
    for speed in (plain, layout):
        assert speed["tokens_per_second"] == pytest.approx(8 * 32 / speed["seconds_per_step"])
        assert speed["memory_gib"] > 0.1
        assert speed["mfu"] is None, "no peak is known of a CPU"
    ratio = layout["tokens_per_second"] / plain["tokens_per_second"]
    assert found["ratio_total"] == pytest.approx(ratio)
    assert found["ratio_per_rank"] == pytest.approx(ratio / 2)


def test_layerwise_trains_the_same_in_one_process() -> None:
    done = bench("--steps", "2", "--warmup", "1", "--rounds", "1", "--layerwise", "--json")
    assert done.returncode == 0, done.stderr
    plain, layerwise, _ = json.loads(done.stdout)["speeds"]
    assert (layerwise["name"], layerwise["ranks"]) == ("layer-wise", 2)
    assert layerwise["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--layerwise", "--ranks", "1"],
            "error: --layerwise: it spreads the layers of a family gpt",
        ),
        (
            ["--layerwise", "--ranks", "4"],
            "error: --layerwise: 4 devices are more than the model's 2",
        ),
        (["--steps", "0"], "error: --steps: 0 is too few; use 1 or more"),
        (["--ranks", "3"], "error: train.global_batch_size: 8 is no multiple of the data parallel"),
    ],
)
def test_it_refuses_in_one_line(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert message in done.stderr
