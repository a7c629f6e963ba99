"""Measure how far apart two runs are, and bound the difference that rounding can cause."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.config.schema import HFModel, Recipe
from launch.parity.run import TrainingRecord
from launch.training.build_model import meta_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Megatron-LM's test_optimizer_grads_match bounds bf16 gradients by 4 * 1.03**(layers above) * eps.
GROWTH_A_LAYER = 1.03


@dataclass(frozen=True)
class Tolerances:
    """The largest relative differences that rounding can explain, over about ten steps."""

    first_loss: float
    loss: float
    grad_norm: float
    matrices: float
    vectors: float


@dataclass(frozen=True)
class Difference:
    """One comparison. `value` is relative to the reference, except "key bias" (see `compare`)."""

    quantity: str
    where: str
    value: float
    tolerance: float

    @property
    def share(self) -> float:
        """The difference as a fraction of the tolerance; infinite if the value is NaN."""
        return self.value / self.tolerance if self.value == self.value else float("inf")

    @property
    def past(self) -> bool:
        """Whether the difference exceeds the tolerance."""
        return not self.share <= 1.0


def tolerances(
    dtype: "torch.dtype",
    layers: int,
    rounds_elsewhere: bool = False,
    rounds_biases_apart: bool = False,
) -> Tolerances:
    """The bounds for a model of `layers` blocks that computes in `dtype`.

    fp32: sums run in a different order, which changes the last digits; depth has no visible effect.
    bf16 and fp16: gradients have 8 or 11 bits of precision and are summed over ranks in it, so the
    bounds are multiples of `1.03**layers * eps` of the dtype. The loss has a tighter bound: it is a
    mean over all tokens, in fp32. Weights have a looser bound: if an element's gradient rounds to
    the opposite sign, Adam steps in the opposite direction. The number of such elements is
    proportional to eps, and the norm of the difference to its square root: so fp16's bound is not
    eight times tighter than bf16's. Vectors (norms, biases) have the loosest bound: they start at
    zero or one, so all of their change comes from Adam's steps.

    The first loss depends on the forward pass alone, which is the same computation on both sides
    unless the layout's forward pass `rounds_elsewhere`: a compiled model, or tensor ranks that each
    round their partial sum to bf16.

    If a linear layer `rounds_biases_apart`, a bias is rounded the same way for all tokens, and the
    mean over tokens does not cancel the error: the bound of the losses after the first step is five
    times as large.
    """
    import torch

    if dtype is torch.float32:
        return Tolerances(first_loss=5e-7, loss=2e-6, grad_norm=5e-6, matrices=5e-6, vectors=1e-5)
    unit = GROWTH_A_LAYER**layers * torch.finfo(dtype).eps
    step = GROWTH_A_LAYER**layers * math.sqrt(
        torch.finfo(dtype).eps * torch.finfo(torch.bfloat16).eps
    )
    loss = unit / 100
    return Tolerances(
        first_loss=loss if rounds_elsewhere else 5e-7,
        loss=5 * loss if rounds_biases_apart else loss,
        grad_norm=unit / 2,
        matrices=2 * step,
        vectors=16 * step,
    )


def tolerances_of(recipe: Recipe, ds_config: dict[str, Any]) -> Tolerances:
    """The bounds for a recipe's layout with this resolved JSON."""
    from launch.ds_json.view import compute_dtype, memory_efficient_linear

    elsewhere = recipe.train.compile or recipe.parallel.tensor > 1
    # Both round the product, then the sum with the bias: DeepSpeed's own linear layer, and a row-parallel
    # layer, which adds the bias after the sum over the ranks.
    apart = memory_efficient_linear(ds_config) or recipe.parallel.tensor > 1
    return tolerances(compute_dtype(ds_config), layer_count(recipe), elsewhere, apart)


def layer_count(recipe: Recipe) -> int:
    """Depth of the recipe's model in blocks."""
    if not isinstance(recipe.model, HFModel):
        return recipe.model.shape.layers
    model: Any = meta_model(recipe)
    return int(model.model.config.num_hidden_layers)


def key_biases(recipe: Recipe) -> dict[str, slice]:
    """The biases of attention's keys, as rows of the tensors that hold them.

    A key bias adds the same number to all of a query's scores, and softmax cancels it: its gradient
    is zero except for rounding, and Adam turns that noise into full-size steps. With rotary
    positions, this nearly holds for the pairs that rotate slowly (measured: 2e-5 of the tensor
    after five steps in fp32, a hundred times the rest). If keys are normalised, the bias does
    matter.
    """
    from launch.checkpoint.full_weights import canonical_names

    model = meta_model(recipe)
    found: dict[str, slice] = {}
    if not isinstance(recipe.model, HFModel):
        config = recipe.model.shape
        if config.qk_norm:
            return {}
        first = config.heads * config.head_dim
        rows = slice(first, first + config.kv_heads * config.head_dim)
        return {n: rows for n in canonical_names(model) if n.endswith("attention.qkv.bias")}
    for name, parameter in canonical_names(model).items():
        if name.endswith("k_proj.bias"):
            found[name] = slice(0, len(parameter))
        elif name.endswith("attn.c_attn.bias"):  # GPT-2: queries, keys, values
            found[name] = slice(len(parameter) // 3, 2 * len(parameter) // 3)
    return found


def compare(
    reference: TrainingRecord,
    layout: TrainingRecord,
    limits: Tolerances,
    free_rows: dict[str, slice],
) -> list[Difference]:
    """Compare every loss, gradient norm and weight tensor of two runs; the worst comes last.

    A tensor's difference is the norm of the difference over the norm of the reference. `free_rows`
    (see `key_biases`) are excluded and reported as "key bias": the largest absolute difference of
    an element, with a tolerance of twice the sum of the learning rates, the furthest that two Adam
    runs can drift apart.

    Raises:
        ValueError: if the two runs differ in their steps or in the names of their weights.
    """
    if reference.weights.keys() != layout.weights.keys():
        raise ValueError(f"weights differ: {reference.weights.keys() ^ layout.weights.keys()}")
    found = []
    for quantity, ours, theirs, limit in (
        ("loss", reference.losses, layout.losses, limits.loss),
        ("grad norm", reference.grad_norms, layout.grad_norms, limits.grad_norm),
    ):
        for step, (expected, got) in enumerate(zip(ours, theirs, strict=True), 1):
            first = quantity == "loss" and step == 1
            relative = abs(got - expected) / abs(expected)
            found.append(
                Difference(
                    quantity, f"step {step}", relative, limits.first_loss if first else limit
                )
            )
    for name, expected_tensor in reference.weights.items():
        expected_rows, got_rows = expected_tensor, layout.weights[name].view_as(expected_tensor)
        if name in free_rows:
            rows = free_rows[name]
            apart = float((got_rows[rows] - expected_rows[rows]).abs().max())
            found.append(Difference("key bias", name, apart, 2 * sum(reference.learning_rates)))
            expected_rows, got_rows = _without(expected_rows, rows), _without(got_rows, rows)
        if expected_rows.numel():
            value = _relative(got_rows, expected_rows)
            limit = limits.matrices if expected_tensor.dim() >= 2 else limits.vectors
            found.append(Difference("weights", name, value, limit))
    return sorted(found, key=lambda difference: difference.share)


def _without(tensor: "Tensor", rows: slice) -> "Tensor":
    import torch

    return torch.cat((tensor[: rows.start], tensor[rows.stop :]))


def _relative(got: "Tensor", expected: "Tensor") -> float:
    apart, size = float((got - expected).norm()), float(expected.norm())
    if size == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    return apart / size
