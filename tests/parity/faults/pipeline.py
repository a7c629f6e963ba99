"""Faults of pipeline parallelism: stages, micro batches between them, and tied weights."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import DOCUMENTS, Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, NORM_1, Seeded
from tests.parity.kinds import PP2, TP2
from tests.parity.planting import plant


def _plant_instruction(name: str, wrong: Any) -> None:
    """The engine takes what it does for each instruction of a schedule from a table."""
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    table = {**PipelineEngine._INSTRUCTION_MAP, getattr(schedule, name): wrong}
    plant(PipelineEngine, "_INSTRUCTION_MAP", table)


def losses_of_micro_batches_summed_in_the_pipeline() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    right = PipelineEngine._aggregate_total_loss

    def wrong(self: Any) -> Any:
        return right(self) * self.micro_batches

    plant(PipelineEngine, "_aggregate_total_loss", wrong)


def tied_gradients_not_summed() -> None:
    _plant_instruction("ReduceTiedGrads", lambda self: None)


def tied_gradients_summed_twice() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    right = PipelineEngine._exec_reduce_tied_grads

    def wrong(self: Any) -> None:
        right(self)
        right(self)

    _plant_instruction("ReduceTiedGrads", wrong)


def tied_weight_drawn_anew_on_the_last_stage() -> None:
    """The copy of the last stage is drawn as if it were an output projection of its own."""
    from launch.training import build_model

    right = vars(build_model)["initialize_parameters"]

    def wrong(parameters: Any, *arguments: Any) -> None:
        last = dist.get_rank() == dist.get_world_size() - 1
        tied = "embedding.token.weight"
        named = [("output.weight" if last and n == tied else n, p) for n, p in parameters]
        right(named, *arguments)

    plant(build_model, "initialize_parameters", wrong)


def layers_of_a_stage_numbered_from_zero() -> None:
    """The second stage takes its blocks for the first ones when it draws their weights."""
    from launch.training import build_model

    right = vars(build_model)["initialize_parameters"]

    def wrong(parameters: Any, *arguments: Any) -> None:
        named = list(parameters)
        blocks = sorted({n.split(".")[1] for n, _ in named if n.startswith("blocks.")}, key=int)
        new = {old: str(i) for i, old in enumerate(blocks)}
        right(
            [
                (".".join(["blocks", new[n.split(".")[1]], *n.split(".")[2:]]), p)
                if n.startswith("blocks.")
                else (n, p)
                for n, p in named
            ],
            *arguments,
        )

    plant(build_model, "initialize_parameters", wrong)


def stage_boundary_that_detaches() -> None:
    """Nothing of the loss comes back to the first stage: what it sent was cut off from the graph."""
    _change_received("_exec_recv_grads", "RecvGrad", "grad_layer", lambda x: x.zero_())


def gradients_sent_back_divided_again() -> None:
    """By the accumulation steps, which the loss has been divided by."""
    _change_received("_exec_recv_grads", "RecvGrad", "grad_layer", lambda x: x.div_(4))


def _change_received(method: str, instruction: str, where: str, change: Any) -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    right = getattr(PipelineEngine, method)

    def wrong(self: Any, buffer_id: int) -> None:
        right(self, buffer_id)
        received = getattr(self, where)
        for tensor in [received] if isinstance(received, Tensor) else received:
            if tensor.is_floating_point():
                change(tensor)

    _plant_instruction(instruction, wrong)


def activations_sent_in_bf16() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    right = PipelineEngine._exec_recv_activations

    def wrong(self: Any, buffer_id: int) -> None:
        right(self, buffer_id)
        received = self.pipe_buffers["inputs"][buffer_id]
        received.data = received.data.bfloat16().float()

    _plant_instruction("RecvActivation", wrong)


def labels_of_another_micro_batch() -> None:
    """The last stage reads its labels in another order than the first stage its tokens."""
    from launch.training import train_step

    right = train_step.pipeline_inputs

    def wrong(micro_batches: Any, denominator: float) -> Any:
        batches = list(right(micro_batches, denominator))
        targets = [target for _, target in batches]
        return iter([(b[0], t) for b, t in zip(batches, targets[::-1], strict=True)])

    plant(train_step, "pipeline_inputs", wrong)


def documents_that_see_each_other_on_the_last_stage() -> None:
    from models import attention, pipeline

    right = attention.attention_inputs

    def wrong(config: Any, sequence: int, positions: Any, device: Any) -> Any:
        last = dist.get_rank() >= dist.get_world_size() // 2
        inputs = right(config, sequence, positions, device)
        return inputs._replace(mask=None) if last else inputs

    plant(pipeline, "attention_inputs", wrong)


def last_norm_left_out() -> None:
    from models.pipeline import GPTPipeline

    right = GPTPipeline.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        for layer in self.forward_funcs:
            if isinstance(layer, torch.nn.LayerNorm):
                object.__setattr__(layer, "forward", lambda x: x)

    plant(GPTPipeline, "__init__", wrong)


def blocks_of_a_stage_reversed() -> None:
    from models.gpt import Block
    from models.pipeline import GPTPipeline

    right = GPTPipeline.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        blocks = [layer for layer in self.forward_funcs if isinstance(layer, Block)]
        backwards = iter(blocks[::-1])
        self.forward_funcs = [
            next(backwards) if isinstance(layer, Block) else layer for layer in self.forward_funcs
        ]

    plant(GPTPipeline, "__init__", wrong)


BOTH = (0, 1)
STAGES = Case("zero1", 2, overrides=(FEW_ROWS, PP2))
LLAMA = Case("zero1", 2, "fp32", "llama", overrides=(FEW_ROWS, PP2, DOCUMENTS))
GRADIENTS, BEFORE, TIED = "parameter gradients", "weights before", r"embedding\.token\.weight"


def _more(stem: str, ranks: int, overrides: tuple[str, ...], sign: str) -> tuple[Any, ...]:
    """Both precisions."""
    return tuple((Case(stem, ranks, p, overrides=overrides), sign) for p in ("fp32", "bf16"))


FAULTS = [
    Seeded(
        losses_of_micro_batches_summed_in_the_pipeline, STAGES, LOSS_1, "loss", "loss",
        "of the step", ranks=BOTH, more=_more("zero1", 2, (PP2,), LOSS_1)[1:],
    ),
    Seeded(
        tied_gradients_not_summed, STAGES, NORM_1, GRADIENTS, TIED, ranks=BOTH,
        more=(*_more("zero0", 2, (PP2,), NORM_1), *_more("zero1", 4, (TP2, PP2), NORM_1)),
    ),
    Seeded(tied_gradients_summed_twice, STAGES, NORM_1, GRADIENTS, TIED, ranks=BOTH),
    Seeded(tied_weight_drawn_anew_on_the_last_stage, STAGES, LOSS_1, BEFORE, TIED, ranks=(1,)),
    Seeded(
        layers_of_a_stage_numbered_from_zero, STAGES, LOSS_1, BEFORE,
        r"blocks\.1\.attention\.qkv\.weight", ranks=(1,),
    ),
    Seeded(
        stage_boundary_that_detaches, STAGES, NORM_1, "backward", r"blocks\.0",
        "gradient of its output", more=(
            *_more("zero1", 2, (PP2,), NORM_1)[1:], *_more("zero1", 4, (TP2, PP2), NORM_1),
        ),
    ),
    Seeded(
        gradients_sent_back_divided_again, STAGES, NORM_1, "backward", r"blocks\.0",
        "gradient of its output",
    ),
    Seeded(
        activations_sent_in_bf16, STAGES, LOSS_1, "forward", r"blocks\.1",
        "its input", ranks=(1,),
    ),
    Seeded(labels_of_another_micro_batch, STAGES, LOSS_1, "batch", "labels", ranks=(1,)),
    Seeded(
        documents_that_see_each_other_on_the_last_stage, LLAMA, LOSS_1, "forward",
        r"blocks\.1\.attention\.out", "its input", ranks=(1,),
    ),
    Seeded(last_norm_left_out, STAGES, LOSS_1, "forward", "norm", "its output", ranks=(1,)),
    Seeded(
        blocks_of_a_stage_reversed, Case("zero1", 2, overrides=(FEW_ROWS, PP2, "model.layers=4")),
        LOSS_1, "forward", r"blocks\.0", "its input", ranks=(0,),
    ),
]  # fmt: skip
