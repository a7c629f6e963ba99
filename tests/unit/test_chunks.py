"""What saves memory: chunks of the sequence, and checkpoints that wait on the CPU. The same numbers."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.memory.estimate import StageMemory, estimate
from launch.perf.memory_measure import measure
from models import gpt
from models.config import SIZES
from models.gpt import GPT
from models.init_weights import initialize

LENGTH = 64
CHUNKS = 3  # do not divide the length
TOKENS = torch.randint(0, 320, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
SAVINGS: dict[str, dict[str, Any]] = {
    "the loss in chunks": {"loss_chunks": CHUNKS},
    "MLPs in chunks": {"mlp_chunks": CHUNKS},
    "MLPs in more chunks than tokens": {"mlp_chunks": 2 * LENGTH},
    "checkpoints on the CPU": {"checkpoint_activations": True, "cpu_checkpointing": True},
    "all": {
        "checkpoint_activations": True,
        "cpu_checkpointing": True,
        "mlp_chunks": CHUNKS,
        "loss_chunks": CHUNKS,
    },
}


def loss_and_gradients(
    savings: dict[str, Any], weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    model = GPT(SIZES["tiny"], **savings).train()
    initialize(model, 1)
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:], weights)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        same = model.eval()(TOKENS[:, :-1], TOKENS[:, 1:], weights)
        torch.testing.assert_close(same, loss)
    return loss, gradients


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("savings", SAVINGS)
def test_loss_and_gradients_are_those_of_a_model_that_saves_nothing(
    savings: str, weighted: bool
) -> None:
    weights = torch.linspace(0, 3, 2 * LENGTH).view(2, LENGTH) if weighted else None
    loss, gradients = loss_and_gradients({}, weights)
    same, found = loss_and_gradients(SAVINGS[savings], weights)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_checkpoints_leave_the_device_until_the_backward_pass(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else keeps what a block was given. Torch copies nothing from a CPU to a CPU; this does."""
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    monkeypatch.setattr(gpt, "save_on_cpu", lambda pin_memory: copies)
    model = GPT(SIZES["tiny"], checkpoint_activations=True, cpu_checkpointing=on_cpu).train()
    initialize(model, 1)
    given: list[weakref.ref[Tensor]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, inputs: given.append(weakref.ref(inputs[0])))
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    assert len(given) == SIZES["tiny"].layers
    assert [there() is not None for there in given] == [not on_cpu] * len(given)
    loss.backward()


def estimated_and_measured(*changes: str) -> tuple[StageMemory, int]:
    """The estimate, and the bytes of tensors that a CPU had. fp32: it has others in bf16."""
    recipe = load_recipe("recipes/gpt_tiny_zero0.yaml", [*changes, "train.global_batch_size=4"])
    layout = plan_layout(recipe, 1)
    (rank,) = measure(recipe, 1, 2)
    return estimate(recipe, layout, resolve(recipe, layout)), rank.peak


@pytest.mark.parametrize("chunks", [1, 8])
def test_the_estimate_of_a_loss_is_what_a_cpu_allocates(chunks: int) -> None:
    """A vocabulary so large that the peak is the loss's."""
    predicted, measured = estimated_and_measured(
        "model.vocab=16384", "model.layers=2", f"model.loss_chunks={chunks}"
    )
    assert predicted.moment == "the loss's backward pass"
    tensors = predicted.parts.total - predicted.parts.overhead
    assert tensors == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("chunks", [1, 8])
def test_the_estimate_of_an_mlp_is_what_a_cpu_allocates(chunks: int, mlp: str) -> None:
    """An MLP so wide that the peak is a block's."""
    predicted, measured = estimated_and_measured(
        "model.ffn=2048", f"model.mlp={mlp}", f"model.mlp_chunks={chunks}"
    )
    assert predicted.moment == "a block's backward pass"
    tensors = predicted.parts.total - predicted.parts.overhead
    assert tensors == pytest.approx(measured, rel=0.05)


def test_the_estimate_has_checkpoints_in_host_memory() -> None:
    sizes = ["model.checkpoint_activations=true", "model.layers=6", "data.sequence_length=256"]
    found = []
    for on_cpu in ("false", "true"):
        recipe = load_recipe(
            "recipes/gpt_tiny_zero0.yaml", [*sizes, f"model.cpu_checkpointing={on_cpu}"]
        )
        layout = plan_layout(recipe, 1)
        found.append((estimate(recipe, layout, resolve(recipe, layout)), layout))
    (there, layout), (away, _) = found
    hidden = SIZES["tiny"].hidden
    checkpoints = 6 * 4 * hidden * 256 * layout.micro_batch
    assert there.parts.activations - away.parts.activations == checkpoints
    assert (there.host, away.host) == ({}, {"checkpoints": checkpoints})
