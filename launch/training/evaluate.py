"""Held-out loss and next-token logits, on either of DeepSpeed's engines."""

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from launch.training.train_step import micro_batch_pairs
from models.gpt import GPT
from models.parallel.collectives import gather_from_group, group_size
from models.pipeline import GPTPipeline


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
            micro_batch_pairs(run), reduce_output=None, bcast_loss=False, num_micro_batches=len(run)
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
