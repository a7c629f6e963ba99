"""A loss that is computed in chunks of the sequence: the same numbers, and fewer bytes."""

import pytest
import torch
from torch import Tensor

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.memory.estimate import estimate
from launch.perf.memory_measure import measure
from models.config import SIZES
from models.gpt import GPT
from models.init_weights import initialize

LENGTH = 64
CHUNKS = 3  # do not divide the length


def loss_and_gradients(chunks: int, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model = GPT(SIZES["tiny"], loss_chunks=chunks).train()
    initialize(model, 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 320, (2, LENGTH + 1), generator=generator)
    loss = model(tokens[:, :-1], tokens[:, 1:], weights)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens[:, :-1], tokens[:, 1:], weights), loss)
    return loss, gradients


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_those_of_the_loss_at_once(weighted: bool) -> None:
    weights = torch.linspace(0, 3, 2 * LENGTH).view(2, LENGTH) if weighted else None
    (loss, at_once), (same, in_chunks) = (loss_and_gradients(n, weights) for n in (1, CHUNKS))
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    assert at_once.keys() == in_chunks.keys()
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_chunks[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunks", [1, 8])
def test_the_estimate_is_what_a_cpu_allocates(chunks: int) -> None:
    """A vocabulary so large that the peak is the loss's. fp32: a CPU has other tensors in bf16."""
    recipe = load_recipe(
        "recipes/gpt_tiny_zero0.yaml",
        [
            "model.vocab=16384",
            "model.layers=2",
            f"model.loss_chunks={chunks}",
            "train.global_batch_size=4",
        ],
    )
    layout = plan_layout(recipe, 1)
    predicted = estimate(recipe, layout, resolve(recipe, layout))
    assert predicted.moment == "the loss's backward pass"
    (rank,) = measure(recipe, 1, 2)
    tensors = predicted.parts.total - predicted.parts.overhead
    assert tensors == pytest.approx(rank.peak, rel=0.01)
