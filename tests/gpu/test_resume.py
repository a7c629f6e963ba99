"""On GPUs too, with deterministic kernels, a resumed run ends with the bits of one that was not stopped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.paths import ROOT
from launch.runtime.local_launcher import free_port
from tests.resume.layouts import same, whole_state
from tests.resume.runs import steps_logged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]

TINY = "recipes/gpt_tiny_zero2.yaml"
SETS = (
    "train.deterministic=true", "train.steps=12", "train.eval_every=0", "checkpoint.every=6",
    "checkpoint.keep=9", "run.sample_tokens=0", "model.dropout=0.1",
)  # fmt: skip
BF16 = "deepspeed.bf16.enabled=true"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "stage 1, bf16": ("deepspeed.config=ds_configs/zero1.json", BF16),
    "stage 2, fp16": ("deepspeed.config=ds_configs/zero2_fp16.json",),
    "stage 3, bf16": ("deepspeed.config=ds_configs/zero3.json", BF16),
    "stage 2, bf16, optimizer on the CPU": ("deepspeed.config=ds_configs/zero2_offload_cpu.json", BF16),
    "stage 1, bf16, in the background": (
        "deepspeed.config=ds_configs/zero1.json", BF16, "checkpoint.asynchronous=true",
    ),
    "tensor 2, stage 1, bf16": (
        "deepspeed.config=ds_configs/zero1.json", BF16, "parallel.tensor=2",
    ),
    "pipeline 2, stage 1, bf16": (
        "deepspeed.config=ds_configs/zero1.json", BF16, "parallel.pipeline=2",
    ),
}  # fmt: skip


def train(folder: Path, *sets: str, resume: Path | None = None) -> str:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port())]  # others may start runs on this machine too
    command += ["launch/train.py", "--config", TINY, "--set", *SETS, f"run.dir={folder}", *sets]
    if resume:
        command += ["--resume", str(resume)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(checkpoint: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in checkpoint.iterdir() if f.name != "manifest.json"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_is_bit_for_bit_the_same(layout: str, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, *LAYOUTS[layout])
    (resumed / "checkpoints").mkdir(parents=True)
    middle = resumed / "checkpoints/step_00000006"
    shutil.copytree(whole / "checkpoints/step_00000006", middle)
    shutil.copyfile(whole / "metrics.jsonl", resumed / "metrics.jsonl")
    train(resumed, *LAYOUTS[layout], resume=middle)
    ends = [run / "checkpoints/step_00000012" for run in (whole, resumed)]
    assert same(*map(whole_state, ends))
    assert files(ends[0]) == files(ends[1])
    assert steps_logged(whole) == steps_logged(resumed)
