"""A run's metrics: one JSON object per step, the console, TensorBoard, W&B, and a loss curve.

metrics.jsonl is the primary record; the rest is drawn from it or written alongside it. Only rank 0
writes. Throughput counts the tokens of all ranks; memory is rank 0's peak.
"""

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.config.schema import Recipe
from launch.errors import UserError
from launch.runtime.hardware import device_peak_tflops, peak_memory_gib
from launch.runtime.run_dir import RunDir, read_metrics
from launch.training.train_step import StepResult

PLAIN_LINES = 20  # approximate number of log lines if there is no terminal for a progress bar


class Metrics:
    """Writes each step's record. Construct it only on rank 0, with the step to start from."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        start: int,
        world_size: int,
        flops_per_token: float,
        device: torch.device,
    ) -> None:
        self.run, self.recipe, self.device = run, recipe, device
        self.tokens_per_step = recipe.train.global_batch_size * recipe.data.sequence_length
        self.flops_per_token = flops_per_token
        self.world_size = world_size
        self.peak = device_peak_tflops(device)
        # A killed run has often logged steps after its last save; they will be rerun and relogged.
        kept = [record for record in read_metrics(run.metrics) if record["step"] <= start]
        self.records = kept
        temporary = run.metrics.with_suffix(".new")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(run.metrics)
        self.file = run.metrics.open("a", buffering=1)
        self.trackers = _trackers(run, recipe, start)
        self.bar = _progress_bar(start, recipe.train.steps)
        self.line_every = max(1, recipe.train.steps // PLAIN_LINES)
        self.clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Exclude the time until now (a save, an evaluation) from the next step's time."""
        self.clock = time.perf_counter()

    def log(self, step: int, result: StepResult) -> None:
        """Record step number `step`, counted from 1."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        speed = self.tokens_per_step / seconds
        tflops = speed * self.flops_per_token / self.world_size / 1e12
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": round(speed, 1),
            "tflops_per_device": round(tflops, 4),
            "mfu": round(tflops / self.peak, 4) if self.peak else None,
            "seconds": round(seconds, 4),
            "memory_gib": round(peak_memory_gib(self.device), 3),
        }
        if result.skipped:
            record["skipped"] = True  # fp16: the gradients overflowed, the loss scale was halved
        self._write(record)
        text = f"loss {result.loss:.4f}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1)
        elif step % self.line_every == 0 or step in (1, self.recipe.train.steps):
            left = (self.recipe.train.steps - step) * seconds
            print(f"step {step}/{self.recipe.train.steps}: {text}, {left:.0f} s left", flush=True)

    def log_validation(self, step: int, loss: float) -> None:
        """Record the validation loss after `step` finished steps."""
        self.records = [
            r for r in self.records if r["step"] != step or validation_loss_of(r) is None
        ]
        self._write({"step": step, "validation_loss": loss, "perplexity": perplexity(loss)})

    def _write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN or infinity, for example the norm of gradients that overflowed in fp16.
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.records.append(record)
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.run.metrics}: cannot write: {error.strerror}; make room and resume"
            ) from None
        scalars = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        for track in self.trackers:
            track(scalars, record["step"])

    def close(self) -> None:
        """Close the progress bar and draw loss.png."""
        if self.bar is not None:
            self.bar.close()
        self.file.close()
        for track in self.trackers:
            track(None, 0)
        draw_loss(self.records, self.run.path / "loss.png", self.recipe.name)


def _progress_bar(start: int, steps: int) -> Any:
    # Some terminals report no size (a bar would be empty); they get plain lines, like a log file.
    if not sys.stderr.isatty() or not os.get_terminal_size(sys.stderr.fileno()).columns:
        return None
    from tqdm import tqdm

    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)


def _trackers(run: RunDir, recipe: Recipe, start: int) -> list[Any]:
    # A tracker takes (scalars, step), and (None, 0) at the end.
    trackers: list[Any] = []
    if recipe.run.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            str(run.path / "tensorboard"), purge_step=start + 1 if start else None
        )

        def tensorboard(scalars: dict[str, float] | None, step: int) -> None:
            if scalars is None:
                writer.close()
                return
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        trackers.append(tensorboard)
    if recipe.run.wandb:
        import wandb

        wandb_run = wandb.init(
            project=recipe.run.wandb, name=run.path.name, dir=run.path, config=recipe.model_dump()
        )
        trackers.append(
            lambda scalars, step: wandb_run.log(scalars, step) if scalars else wandb_run.finish()
        )
    return trackers


def check_trackers(recipe: Recipe) -> None:
    """Reject a requested tracker that is not installed, before anything is computed.

    Raises:
        UserError: naming the package to install.
    """
    if recipe.run.wandb:
        try:
            importlib.import_module("wandb")
        except ImportError:
            raise UserError(
                "run.wandb: wandb is not installed; pip install wandb, or set run.wandb=null"
            ) from None


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def validation_loss_of(record: dict[str, Any]) -> float | None:
    """The validation loss of a metrics.jsonl record; older versions call it `held_out_loss`."""
    loss: float | None = record.get("validation_loss", record.get("held_out_loss"))
    return loss


def draw_loss(records: list[dict[str, Any]], file: Path, title: str) -> None:
    """Plot training and validation loss over tokens."""
    # Without pyplot, which also looks for a window system.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    training = [r for r in records if "loss" in r]
    if not training:
        return
    per_step = training[-1]["tokens"] / training[-1]["step"]
    validation = [
        (r["step"] * per_step, loss) for r in records if (loss := validation_loss_of(r)) is not None
    ]
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    axes.plot(
        [r["tokens"] for r in training], [r["loss"] for r in training], lw=1.2, label="training"
    )
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            "o-",
            color="tab:red",
            lw=0.8,
            ms=4,
            label=f"validation ({validation[-1][1]:.3f})",
        )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, not 1e6
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.12, top=0.93)
    figure.savefig(file)
