"""Several model chunks a stage on the pipeline engine, which knows of one."""

from types import MethodType

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import (
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)
from torch import Tensor

from models.parallel.collectives import Group, gather_from_group, group_rank, group_size
from models.parallel.ring import Kind, Ring
from models.pipeline_schedules import InterleavedInference, StartChunk


def run_model_chunks(engine: PipelineEngine, ring: Ring) -> None:
    """Have an engine run the chunks of its stage in turn, with messages round the ring.

    Defect: an engine runs one part of the model. It is first or last by its rank alone, talks to the
        ranks beside its own, and its sends wait for the receiver, which round a ring waits for ever.
    Versions: DeepSpeed 0.19.8.
    Workaround: ask the module what part runs, and send by `Ring`. What all tensor ranks have, each sends
        a share of, as the engine itself does; the next stage gathers it over the faster link.
    Proof: test_pipeline.py::test_engine_is_first_and_last_by_its_rank_alone
    """
    module = engine.module
    engine.is_first_stage = module.at_start
    engine.is_last_stage = module.at_end
    engine.prev_stage = (engine.stage_id - 1) % engine.num_stages
    engine.next_stage = (engine.stage_id + 1) % engine.num_stages
    engine.is_pipe_partitioned = engine.is_grad_partitioned = False
    ring.connect(engine.device)
    group = None if module.tp.sequence_parallel else module.tp.group

    def inference_schedule(self: PipelineEngine, micro_batches: int) -> PipeSchedule:
        return InterleavedInference(
            micro_batches, self.num_stages, self.stage_id, module.model_chunks
        )

    def start_chunk(self: PipelineEngine, chunk: int | None) -> None:
        module.chunk = chunk
        if chunk is None:
            ring.wait()

    def send(kind: Kind, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            ring.send(kind, _share(tensor, group))

    def receive(kind: Kind, like: Tensor) -> Tensor:
        received = ring.receive(kind, _share(like, group))
        if received.numel() == like.numel():
            return received.view(like.shape)
        return gather_from_group(received, 0, group).view(like.shape)

    def send_activation(self: PipelineEngine, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.first_output_send:
            self.first_output_send = False
            self._send_tensor_meta(outputs, self.next_stage)
        send("forward", _as_list(outputs))

    def receive_activation(self: PipelineEngine, buffer_id: int) -> None:
        if self.pipe_recv_buf is None:
            self.pipe_recv_buf = self._recv_tensor_meta(self.prev_stage)
        received = [receive("forward", like) for like in _as_list(self.pipe_recv_buf)]
        for tensor in received:
            tensor.requires_grad = tensor.is_floating_point()
        together = isinstance(self.pipe_recv_buf, tuple)
        self.pipe_buffers["inputs"][buffer_id] = tuple(received) if together else received[0]

    def send_gradient(self: PipelineEngine, buffer_id: int) -> None:
        inputs = _as_list(self.pipe_buffers["inputs"][buffer_id])
        send("backward", [x.grad for x in inputs if x.grad is not None])
        self.pipe_buffers["inputs"][buffer_id] = None

    def receive_gradient(self: PipelineEngine, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        received = [
            receive("backward", like) for like in _as_list(outputs) if like.is_floating_point()
        ]
        self.grad_layer = received if isinstance(outputs, tuple) else received[0]

    engine._inference_schedule = MethodType(inference_schedule, engine)
    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        StartChunk: start_chunk,
        SendActivation: send_activation,
        RecvActivation: receive_activation,
        SendGrad: send_gradient,
        RecvGrad: receive_gradient,
    }


def _share(tensor: Tensor, group: Group) -> Tensor:
    """A rank's share of a tensor that all ranks of a group have; of one of integers, all of it."""
    if group is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().flatten().chunk(group_size(group))[group_rank(group)]


def _as_list(sent: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [sent] if isinstance(sent, torch.Tensor) else list(sent)
