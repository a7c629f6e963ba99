"""Faults of a loss that is computed in chunks of the sequence (`model.loss_chunks`)."""

import torch
from torch import Tensor

from models.gpt import GPT
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


IN_CHUNKS = Case("zero1", 1, overrides=(FEW_ROWS, "model.loss_chunks=3"))
FAULTS = [
    Seeded(last_chunk_left_out, IN_CHUNKS, LOSS_1, "loss", "loss", "of a micro batch"),
    Seeded(
        gradient_of_one_chunk_alone, IN_CHUNKS, NORM_1, "backward", "norm", "gradient of its output"
    ),
]
