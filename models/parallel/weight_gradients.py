"""A linear layer's backward pass in two parts, of which the second can wait.

The backward pass of y = x W^T + b is two products, and neither needs the other's result
(zero-bubble pipelines, arXiv:2401.10241):

    B    dx = dy W                     the layers before this one wait for it
    W    dW = dy^T x,  db = sum of dy  only the optimizer's step waits for it

`WeightGradients.linear` computes what `F.linear` does. Its backward pass is B alone, and leaves x
and dy for `run`, which computes W when a pipeline stage has nothing else to do. Other weights
(norms, embeddings, the bias of a row-parallel layer, which is added after a sum over the ranks) get
their gradients from B as ever.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class _Product(NamedTuple):
    """What W of one layer needs: x `[..., in]`, dy `[..., out]`, and where dW and db go."""

    x: Tensor
    dy: Tensor
    edges: list[GradientEdge]


class WeightGradients:
    """The weight gradients that wait, of one micro batch after another."""

    def __init__(self) -> None:
        self._micro_batch: list[_Product] = []  # the one in its backward pass
        self._waiting: deque[list[_Product]] = deque()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, except that gradients of `weight` and `bias` wait for `run`.

        `[..., in]` to `[..., out]`.
        """
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        weights = [weight] if bias is None else [weight, bias]
        if torch.is_autocast_enabled(x.device.type):
            # As autocast does for F.linear; the gradients are cast back on their way to the weights.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), [each.to(dtype) for each in weights]
        edges = [get_gradient_edge(each) for each in weights]
        linear: Any = _Linear.apply  # torch does not type it
        # Detached: autograd must not expect a gradient of the weights from this backward pass.
        y: Tensor = linear(self, edges, x, *(each.detach() for each in weights))
        return y

    def put(self, x: Tensor, dy: Tensor, edges: list[GradientEdge]) -> None:
        """Leave a layer's weight gradient for later."""
        self._micro_batch.append(_Product(x, dy, edges))

    def end_micro_batch(self) -> None:
        """Mark the end of a micro batch's backward pass."""
        self._waiting.append(self._micro_batch)
        self._micro_batch = []

    def run(self) -> None:
        """Compute the weight gradients of the micro batch that has waited longest.

        They take autograd's way to the parameters: added to `grad`, and every hook runs.
        """
        products = deque(self._waiting.popleft())
        while products:  # each is let go as soon as it is used
            x, dy, edges = products.popleft()
            rows = dy.flatten(0, -2)
            gradients = [rows.t() @ x.flatten(0, -2)]
            if len(edges) > 1:
                gradients.append(rows.sum(0))
            torch.autograd.backward(edges, gradients)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept for `run`."""
        for products in (*self._waiting, self._micro_batch):
            for product in products:
                yield from (product.x, product.dy)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        later: WeightGradients,
        edges: list[GradientEdge],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.edges, ctx.inputs = later, edges, 4 if bias is None else 5
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.later.put(x, dy, ctx.edges)
        return (None, None, dy @ weight, None, None)[: ctx.inputs]
