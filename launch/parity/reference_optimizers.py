"""The optimizers of the reference, in plain PyTorch: the steps that DeepSpeed's have to equal."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Muon is for the matrices between embedding and output projection; those two, norms and biases are Adam's.
_NOT_HIDDEN = ("embedding.", "output.")
# Five steps of a polynomial that moves singular values towards 1, by Keller Jordan.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def adamw(named: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> list[Optimizer]:
    """AdamW with decoupled decay (arXiv:1711.05101); vectors are not decayed."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in named.values() if p.dim() > 1]},
        {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0},
    ]
    return [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=float(settings.get("adam_lr", settings["lr"])),
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
        )
    ]


def muon(named: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> list[Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest."""
    hidden = {n: p for n, p in named.items() if p.dim() > 1 and not n.startswith(_NOT_HIDDEN)}
    rest = {name: p for name, p in named.items() if name not in hidden}
    first = Muon(
        list(hidden.values()),
        lr=float(settings.get("muon_lr", settings["lr"])),
        momentum=settings.get("momentum", 0.95),
        weight_decay=settings["weight_decay"],
    )
    return [first, *adamw(rest, settings)]


# Keyed by the optimizer type in a DeepSpeed JSON, in lower case. DeepSpeed's "Adam" is also AdamW.
OPTIMIZERS: dict[
    str, Callable[[Mapping[str, nn.Parameter], Mapping[str, Any]], list[Optimizer]]
] = {"adam": adamw, "adamw": adamw, "muon": muon}


class Muon(Optimizer):
    """Momentum, made orthogonal (https://kellerjordan.github.io/posts/muon/), computed in fp32."""

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, with Nesterov's momentum and decoupled weight decay."""
        for group in self.param_groups:
            beta = group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                old = self.state[weight].get("momentum_buffer", torch.zeros_like(weight))
                average = beta * old + (1 - beta) * weight.grad
                self.state[weight]["momentum_buffer"] = average
                ahead = beta * average + (1 - beta) * weight.grad
                rows, columns = weight.shape
                size = group["lr"] * math.sqrt(max(1.0, rows / columns))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(size * orthogonal(ahead))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix `[rows, columns]` with its singular values moved to between about 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    wide: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
