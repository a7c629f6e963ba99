"""What only a GPU can show: parity over NCCL on all GPUs of the machine, fp16, and torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.paths import ROOT
from launch.runtime.run_dir import read_metrics
from models.config import SIZES
from models.gpt import GPT
from models.init_weights import initialize

pytestmark = pytest.mark.gpu

BF16 = {"zero0": "deepspeed.torch_autocast.enabled=true"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "stage", ["zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu"]
)
def test_layout_equals_one_device(stage: str, precision: str, tmp_path: Path) -> None:
    changes = ["model.position=learned"]
    if precision == "bf16":
        changes.append(BF16.get(stage, "deepspeed.bf16.enabled=true"))
    recipe = f"recipes/gpt_tiny_{stage}.yaml"
    done = run("scripts/parity.py", "--config", recipe, "--out", str(tmp_path), "--set", *changes)
    assert done.returncode == 0, done.stdout + done.stderr


def train(folder: Path, *changes: str, **environment: str) -> list[float]:
    settings = ["train.steps=40", "train.eval_every=0", "run.sample_tokens=40", f"run.dir={folder}"]
    recipe = "recipes/gpt_tiny_zero2.yaml"
    done = run("launch/train.py", "--config", recipe, "--set", *settings, *changes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout + done.stderr)
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


def test_cuda_graphs_record_evaluate_and_sample(tmp_path: Path) -> None:
    settings = ["train.compile=true", "train.cuda_graphs=true", "deepspeed.bf16.enabled=true"]
    settings += ["deepspeed.config=ds_configs/zero1.json", "train.eval_every=20"]
    losses = train(tmp_path, *settings, TORCH_LOGS="cudagraphs")
    assert losses[-1] < losses[0] - 1
    assert "Recording function" in (tmp_path / "printed").read_text()
    records = read_metrics(tmp_path / "metrics.jsonl")
    evaluated = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert len(evaluated) >= 2 and evaluated[-1] < losses[0] - 1
    assert (tmp_path / "sample.txt").read_text().startswith("def ")


def kept_on_the_gpu(cpu_checkpointing: bool) -> tuple[int, torch.Tensor]:
    with torch.device("cuda"):
        model = GPT(
            SIZES["tiny"], checkpoint_activations=True, cpu_checkpointing=cpu_checkpointing
        ).train()
    initialize(model, 1)
    tokens = torch.zeros(64, SIZES["tiny"].context + 1, dtype=torch.int64, device="cuda")
    # Twice: the first pass also allocates what the libraries keep.
    for _ in range(2):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    gradient = model.embedding.token.weight.grad
    assert gradient is not None
    return kept, gradient


@pytest.mark.parametrize("on_cpu", [False, True])
def test_checkpoints_leave_the_gpu_until_the_backward_pass(on_cpu: bool) -> None:
    all_there, expected = kept_on_the_gpu(False)
    some, found = kept_on_the_gpu(on_cpu)
    rows = 64 * SIZES["tiny"].context
    one = 4 * SIZES["tiny"].hidden * rows
    assert all_there - some == (one * SIZES["tiny"].layers if on_cpu else 0)
    # One row of the gradient is a sum over all tokens, which fp32 knows to sqrt(rows) * eps.
    rtol = rows**0.5 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)
