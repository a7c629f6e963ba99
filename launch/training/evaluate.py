"""Validation loss and next-token logits, on either of DeepSpeed's engines."""

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from launch.data.batch import MicroBatch, ValidationSet
from launch.training.train_step import pipeline_inputs
from models.gpt import GPT
from models.parallel.collectives import gather_from_group, group_size
from models.pipeline import GPTPipeline


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, validation: ValidationSet) -> float:
    """The validation loss: the weighted mean over the labels of all ranks."""
    engine.eval()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    if isinstance(engine, PipelineEngine):
        for loss in _pipeline_losses(engine, validation.micro_batches):  # on the last stage alone
            total += loss
    else:
        for batch in validation.micro_batches:
            total += engine(*batch.to(engine.device))  # a CUDA graph's next result takes its place
    dist.all_reduce(total, group=engine.data_parallel_group)
    if isinstance(engine, PipelineEngine):
        _broadcast_from_last_stage(engine, total)
    engine.train()
    return float(total) / validation.total_weight


def _pipeline_losses(engine: PipelineEngine, batches: list[MicroBatch]) -> list[Tensor]:
    """Each micro batch's summed loss on the last stage; nothing on other stages."""
    losses: list[Tensor] = []
    # The last batch may be smaller on some ranks; each call is a barrier for all ranks.
    for run in (batches[:-1], batches[-1:]):
        if not run:
            continue
        engine.reset_activation_shape()  # stages exchange shapes only once
        found = engine.eval_batch(
            pipeline_inputs(run, 1.0),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(run),
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

    Every rank must call it with the same tokens: under ZeRO-3, tensor and pipeline parallelism, a
    forward pass is collective.
    """
    engine.eval()
    count = tokens.shape[1]
    # Later tokens do not affect a token's logits, so padding at the end changes nothing.
    if not isinstance(engine, PipelineEngine):
        cut = group_size(engine.module.tp.sequence_group) if isinstance(engine.module, GPT) else 1
        padded = torch.nn.functional.pad(tokens, (0, -count % cut))
        scores: Tensor = engine(padded)[:, :count].contiguous()
        dist.broadcast(scores, 0)
        return scores
    # Stages exchange tensors of a fixed length, the training length.
    padded = torch.nn.functional.pad(tokens, (0, context - count))
    module: GPTPipeline = engine.module
    engine.reset_activation_shape()
    _, logits = engine.eval_batch(
        pipeline_inputs([MicroBatch(padded, padded)], 1.0),
        return_logits=True,
        bcast_loss=False,
        reduce_output=None,
        num_micro_batches=1,
    )
    engine.reset_activation_shape()
    if engine.is_last_stage():
        whole = gather_from_group(logits, -1, module.tp.group)[:, :count, : module.config.vocab]
        whole = whole.float().contiguous()
    else:
        whole = torch.empty((1, count, module.config.vocab), device=engine.device)
    _broadcast_from_last_stage(engine, whole)
    return whole
