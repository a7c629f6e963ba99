"""What only a GPU can show: parity over NCCL on all GPUs of the machine, fp16, and torch.compile."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.paths import ROOT
from launch.runtime.run_dir import read_metrics

pytestmark = pytest.mark.gpu

BF16 = {"zero0": "deepspeed.torch_autocast.enabled=true"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_layout_equals_one_device(stage: str, precision: str, tmp_path: Path) -> None:
    changes = ["model.position=learned"]
    if precision == "bf16":
        changes.append(BF16.get(stage, "deepspeed.bf16.enabled=true"))
    recipe = f"recipes/gpt_tiny_{stage}.yaml"
    done = run("scripts/parity.py", "--config", recipe, "--out", str(tmp_path), "--set", *changes)
    assert done.returncode == 0, done.stdout + done.stderr


def train(folder: Path, *changes: str) -> list[float]:
    settings = ["train.steps=40", "train.eval_every=0", "run.sample_tokens=40", f"run.dir={folder}"]
    recipe = "recipes/gpt_tiny_zero2.yaml"
    done = run("launch/train.py", "--config", recipe, "--set", *settings, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize(
    "config", sorted(p.stem for p in (ROOT / "ds_configs").glob("*_fp16.json"))
)
def test_fp16_trains(config: str, tmp_path: Path) -> None:
    losses = train(tmp_path, f"deepspeed.config=ds_configs/{config}.json")
    assert losses[-1] < losses[0] - 1


def test_a_compiled_model_trains_and_writes(tmp_path: Path) -> None:
    losses = train(tmp_path, "train.compile=true", "deepspeed.bf16.enabled=true")
    assert losses[-1] < losses[0] - 1
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
