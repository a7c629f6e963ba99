"""Workarounds for DeepSpeed's pipeline engine."""

from types import MethodType

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import (
    PipeSchedule,
    ReduceTiedGrads,
)

from models.pipeline_schedules import SCHEDULES, KeepLoss, TakeLoss


def sum_tied_gradients_where_they_are(engine: PipelineEngine) -> None:
    """Work around DeepSpeed 0.19.8 where gradients are accumulated in fp32 beside a 16-bit model.

    There ZeRO-1 (in fp16, or offloaded; not BF16_Optimizer) moves each micro batch's gradient to
    `grad_accum`, and the pipeline engine adds up the tied copies' `grad`, which is then empty: each copy
    of a tied weight goes its own way.
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return

    def reduce_tied_gradients(self: PipelineEngine) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(weight.grad_accum, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce_tied_gradients}


def use_schedule(engine: PipelineEngine, name: str) -> None:
    """Make an engine run the schedule of this name, one of `SCHEDULES`, in `train_batch`."""

    def train_schedule(self: PipelineEngine) -> PipeSchedule:
        return SCHEDULES[name](self.micro_batches, self.num_stages, self.stage_id)

    def keep_loss(self: PipelineEngine, buffer_id: int) -> None:
        self.pipe_buffers["losses"][buffer_id] = self.loss

    def take_loss(self: PipelineEngine, buffer_id: int) -> None:
        self.loss = self.pipe_buffers["losses"][buffer_id]
        self.pipe_buffers["losses"][buffer_id] = None
        # The engine would hold on to the logits too, of every micro batch, until the next step.
        self.pipe_buffers["outputs"][buffer_id] = None

    engine._train_schedule = MethodType(train_schedule, engine)
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, KeepLoss: keep_loss, TakeLoss: take_loss}
    engine.pipe_buffers["losses"] = [None] * engine.num_pipe_buffers
