"""One training step, held-out loss and next-token scores, on either of DeepSpeed's engines.

The dense engine runs forward, backward and step as it is told; the pipeline engine runs a schedule of
them over all stages, of which each rank has one. What comes out is the same on every rank.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from models.gpt import GPT
from models.pipeline import GPTPipeline
from models.tp_ops import gather_from_group, group_size


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: means over the global batch, the norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False


def train_step(engine: DeepSpeedEngine, batch: Tensor) -> Step:
    """One optimizer step on this rank's part of a global batch.

    `batch` is `[accumulation, micro_batch, sequence + 1]`: each row's tokens predict the same row
    one place on. DeepSpeed divides each micro batch's loss by the accumulation steps, and averages
    the gradients over the data parallel ranks.
    """
    learning_rate = float(engine.get_lr()[0])
    if isinstance(engine, PipelineEngine):
        loss = float(engine.train_batch(_pairs(batch)))
    else:
        loss_sum = torch.zeros((), device=engine.device)
        for sequences in batch.to(engine.device):
            micro_loss = engine(sequences[:, :-1], sequences[:, 1:])
            loss_sum += micro_loss.detach()
            engine.backward(micro_loss)
            engine.step()
        loss_sum /= len(batch)
        dist.all_reduce(loss_sum, group=engine.data_parallel_group)
        loss = loss_sum.item() / dist.get_world_size(engine.data_parallel_group)
    norm = engine.get_global_grad_norm()
    return Step(
        loss=loss,
        grad_norm=math.nan if norm is None else float(norm),
        learning_rate=learning_rate,
        skipped=not engine.was_step_applied(),
    )


def _pairs(batch: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each micro batch, as the pipeline engine takes them."""
    return iter([(sequences[:, :-1], sequences[:, 1:]) for sequences in batch])


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, share: list[tuple[Tensor, int]]) -> float:
    """Mean loss per token over all ranks' held-out sequences, as shared out by `held_out_share`.

    `share` holds micro batches `[n, sequence + 1]` with the number of their rows that count.
    """
    engine.eval()
    if isinstance(engine, PipelineEngine):
        losses = _pipeline_losses(engine, [rows for rows, _ in share])
    else:
        batches = (rows.to(engine.device) for rows, _ in share)
        losses = [engine(rows[:, :-1], rows[:, 1:]) for rows in batches]
    # A stage other than the last has no losses; its totals are nobody's.
    weights = [float(counted) for _, counted in share]
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for loss, weight in zip(losses, weights, strict=False):
        totals += torch.tensor([loss.item() * weight, weight], device=engine.device)
    dist.all_reduce(totals, group=engine.data_parallel_group)
    if isinstance(engine, PipelineEngine):
        _broadcast_from_last_stage(engine, totals)
    engine.train()
    return float(totals[0] / totals[1])


def _pipeline_losses(engine: PipelineEngine, batches: list[Tensor]) -> list[Tensor]:
    """The loss of each micro batch `[n, sequence + 1]`, on the last stage; elsewhere none."""
    losses: list[Tensor] = []
    # The last one may be smaller, on some of the ranks; each call is a barrier for all of them.
    for run in (batches[:-1], batches[-1:]):
        if not run:
            continue
        engine.reset_activation_shape()  # stages tell each other shapes only once
        found = engine.eval_batch(
            _pairs(run), reduce_output=None, bcast_loss=False, num_micro_batches=len(run)
        )
        losses += found or []
    engine.reset_activation_shape()
    return losses


def _broadcast_from_last_stage(engine: PipelineEngine, values: Tensor) -> None:
    grid = engine.grid
    dist.broadcast(
        values, grid.stage_to_global(engine.num_stages - 1), group=grid.get_pipe_parallel_group()
    )


@torch.no_grad()
def next_token_logits(engine: DeepSpeedEngine, tokens: Tensor, context: int) -> Tensor:
    """`[1, n]` token ids, n at most `context`, to logits `[1, n, vocab]`; the same on every rank.

    Every rank has to call it with the same tokens: under ZeRO-3, tensor and pipeline parallelism a
    forward pass is a collective.
    """
    engine.eval()
    count = tokens.shape[1]
    # What follows a token has no part in its logits, so that padding behind them changes none.
    if not isinstance(engine, PipelineEngine):
        cut = group_size(engine.module.tp.sequence_group) if isinstance(engine.module, GPT) else 1
        padded = torch.nn.functional.pad(tokens, (0, -count % cut))
        scores: Tensor = engine(padded)[:, :count].contiguous()
        dist.broadcast(scores, 0)
        return scores
    # Stages send each other tensors of one length, that of training.
    padded = torch.nn.functional.pad(tokens, (0, context - count))
    module: GPTPipeline = engine.module
    engine.reset_activation_shape()
    _, logits = engine.eval_batch(
        iter([(padded, padded)]),
        return_logits=True,
        bcast_loss=False,
        reduce_output=None,
        num_micro_batches=1,
    )
    engine.reset_activation_shape()
    if engine.is_last_stage():
        whole = gather_from_group(logits, -1, module.tp_group)[:, :count, : module.config.vocab]
        whole = whole.float().contiguous()
    else:
        whole = torch.empty((1, count, module.config.vocab), device=engine.device)
    _broadcast_from_last_stage(engine, whole)
    return whole
