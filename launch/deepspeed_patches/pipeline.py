"""The pipeline engine: tied gradients that are not summed, and one loss for all micro batches."""

from types import MethodType

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, PipeSchedule, RecvGrad, ReduceTiedGrads

from models.parallel.weight_gradients import WeightGradients
from models.pipeline_schedules import KeepLoss, TakeLoss, WeightPass, train_schedule


def sum_tied_gradients_where_they_are(engine: PipelineEngine) -> None:
    """Sum the gradients of a weight that two stages share, where fp32 accumulation puts them.

    Defect: beside a 16-bit model, ZeRO-1 with fp32 accumulation (in fp16, or with its optimizer on the
        CPU; not BF16_Optimizer) moves each micro batch's gradient to `grad_accum`. The pipeline engine
        sums the copies' `grad`, which is empty then, and the copies drift apart.
    Versions: DeepSpeed 0.19.8.
    Workaround: sum `grad_accum`. Does nothing where gradients are not there.
    Proof: test_pipeline.py::test_tied_weights_drift_apart
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return

    def reduce_tied_gradients(self: PipelineEngine) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(weight.grad_accum, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce_tied_gradients}


def use_schedule(engine: PipelineEngine, name: str) -> None:
    """Make an engine run the schedule of this name, as `parallel.schedule` has it, in `train_batch`.

    Defect: the engine keeps one loss, that of the last forward pass. A schedule whose backward pass does
        not follow at once starts it from the wrong loss. The engine also keeps the logits of every
        micro batch until the next step.
    Versions: DeepSpeed 0.19.8.
    Workaround: keep a loss for each buffer, and let the logits go when the backward pass starts.
    Proof: test_pipeline.py::test_engine_keeps_one_loss_and_all_logits
    """

    def schedule(self: PipelineEngine) -> PipeSchedule:
        return train_schedule(
            name, self.micro_batches, self.num_stages, self.stage_id, self.module.model_chunks
        )

    def keep_loss(self: PipelineEngine, buffer_id: int) -> None:
        self.pipe_buffers["losses"][buffer_id] = self.loss

    def take_loss(self: PipelineEngine, buffer_id: int) -> None:
        self.loss = self.pipe_buffers["losses"][buffer_id]
        self.pipe_buffers["losses"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    engine._train_schedule = MethodType(schedule, engine)
    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        **{kind: type(engine)._INSTRUCTION_MAP[kind] for kind in (RecvGrad, BackwardPass)},
        KeepLoss: keep_loss,
        TakeLoss: take_loss,
    }
    engine.pipe_buffers["losses"] = [None] * engine.num_pipe_buffers
    engine.module.split_backward(None)
    if name == "zb-h1":
        run_weight_passes(engine)


def run_weight_passes(engine: PipelineEngine) -> None:
    """Have backward passes leave weight gradients to weight passes, which the engine does not know.

    Defect: BF16_Optimizer gets a micro batch's gradients at the end of its backward pass, and the next
        backward pass clears them first. The step sees nothing of gradients that come in between.
    Versions: DeepSpeed 0.19.8.
    Workaround: a weight pass hands them over as a backward pass does. It leaves no gradient behind, of
        which each backward pass would add zeros to the sums.
    Proof: test_pipeline.py::test_gradients_between_backward_passes_are_lost
    """
    later = WeightGradients()
    table = engine._INSTRUCTION_MAP
    receive, whole_backward_pass = table[RecvGrad], table[BackwardPass]

    def receive_gradient(self: PipelineEngine, buffer_id: int) -> None:
        # The last layer waits with the very tensor: the engine must not receive anything else into it.
        self.grad_layer, self._grad_layer_buf = None, []
        receive(self, buffer_id)

    def backward_pass(self: PipelineEngine, buffer_id: int) -> None:
        whole_backward_pass(self, buffer_id)
        later.end_micro_batch()

    def weight_pass(self: PipelineEngine) -> None:
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads(set_to_none=True)
        self._running_engine_backward = True  # for DeepSpeed's hooks, as in a backward pass
        try:
            later.run()
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads()
            self.optimizer.clear_lp_grads(set_to_none=True)

    engine.module.split_backward(later)
    engine._INSTRUCTION_MAP = {
        **table,
        RecvGrad: receive_gradient,
        BackwardPass: backward_pass,
        WeightPass: weight_pass,
    }
