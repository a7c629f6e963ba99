"""Faults of what saves memory: chunks of the sequence, and checkpoints in host memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from models import gpt
from models.gpt import GPT, MLP
from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, NORM_1, Seeded
from tests.parity.planting import plant


def last_chunk_left_out() -> None:
    right = GPT._summed_loss_in_chunks

    def wrong(self: GPT, x: Tensor, labels: Tensor, loss_weights: Tensor | None) -> Tensor:
        kept = slice(x.shape[1] * (self.loss_chunks - 1) // self.loss_chunks)
        weights = None if loss_weights is None else loss_weights[:, kept]
        return right(self, x[:, kept], labels[:, kept], weights)

    plant(GPT, "_summed_loss_in_chunks", wrong)


def gradient_of_one_chunk_alone() -> None:
    right = GPT._summed_loss_in_chunks

    def wrong(self: GPT, x: Tensor, labels: Tensor, loss_weights: Tensor | None) -> Tensor:
        first = x.shape[1] // self.loss_chunks
        x = torch.cat((x[:, :first], x[:, first:].detach()), 1)
        return right(self, x, labels, loss_weights)

    plant(GPT, "_summed_loss_in_chunks", wrong)


def chunks_of_an_mlp_in_reverse() -> None:
    right = MLP.forward

    def wrong(self: MLP, x: Tensor) -> Tensor:
        return torch.cat(right(self, x).chunk(self.chunks, 1)[::-1], 1)

    plant(MLP, "forward", wrong)


def gradient_of_an_mlps_first_chunk_alone() -> None:
    right = MLP.forward

    def wrong(self: MLP, x: Tensor) -> Tensor:
        first = x.shape[1] // self.chunks
        return right(self, torch.cat((x[:, :first], x[:, first:].detach()), 1))

    plant(MLP, "forward", wrong)


def checkpoints_share_their_memory() -> None:
    taken: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if taken:
            taken[0].copy_(tensor)
        else:
            taken.append(tensor.clone())
        return taken[0]

    @contextlib.contextmanager
    def wrong(pin_memory: bool) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
            yield

    plant(gpt, "save_on_cpu", wrong)


IN_CHUNKS = Case("zero1", 1, overrides=(FEW_ROWS, "model.loss_chunks=3"))
MLP_IN_CHUNKS = Case("zero1", 1, overrides=(FEW_ROWS, "model.mlp_chunks=3"))
ON_CPU = Case(
    "zero1", 1, checkpoint_activations=True, overrides=(FEW_ROWS, "model.cpu_checkpointing=true")
)
FAULTS = [
    Seeded(last_chunk_left_out, IN_CHUNKS, LOSS_1, "loss", "loss", "of a micro batch"),
    Seeded(
        gradient_of_one_chunk_alone, IN_CHUNKS, NORM_1, "backward", "norm", "gradient of its output"
    ),
    Seeded(
        chunks_of_an_mlp_in_reverse, MLP_IN_CHUNKS, LOSS_1, "forward", r"blocks.0.mlp", "its output"
    ),
    Seeded(
        gradient_of_an_mlps_first_chunk_alone, MLP_IN_CHUNKS, NORM_1,
        "backward", r"blocks.\d.mlp", "gradient of its input",
    ),
    Seeded(
        checkpoints_share_their_memory, ON_CPU, NORM_1,
        "backward", "blocks.0.mlp.up", "gradient of its output",
    ),
]  # fmt: skip
