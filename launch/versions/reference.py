"""What a probe has to compute: the same training in plain PyTorch, on one device, without DeepSpeed."""

from typing import Any

import torch
from torch import Tensor

from launch.versions.model import Model, batch
from launch.versions.probes import STEPS, Probe
from launch.versions.results import Record, Weights

DTYPES = {
    "fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
FP16_SCALE = 1024.0
# Muon and the Adam beside it share a rate: its first versions have one key for both.
SGD_RATE, ADAM_RATE = 0.5, 0.02
BETAS, EPSILON, MOMENTUM = (0.9, 0.95), 1e-8, 0.95


def optimizers(
    kind: str, masters: dict[str, Tensor], muon: frozenset[str] = frozenset()
) -> list[torch.optim.Optimizer]:
    """The optimizers of a probe over fp32 weights by name; `muon` are those that Muon takes."""
    every = list(masters.values())
    if kind == "sgd":
        return [torch.optim.SGD(every, lr=SGD_RATE)]
    adam: dict[str, Any] = {"lr": ADAM_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0}
    if kind == "adamw":
        return [torch.optim.AdamW(every, **adam)]
    matrices = [weight for name, weight in masters.items() if name in muon]
    rest = [weight for name, weight in masters.items() if name not in muon]
    return [
        torch.optim.Muon(matrices, lr=ADAM_RATE, momentum=MOMENTUM, weight_decay=0.0),
        torch.optim.AdamW(rest, **adam),
    ]


def initial_weights(probe: Probe) -> Weights:
    """The weights before the first step, as the model computes with them."""
    dtype = DTYPES[probe.dtype]
    named = Model(probe.shape).named_parameters()
    return {name: p.detach().to(dtype).float().numpy() for name, p in named}


def train(probe: Probe, muon: frozenset[str] = frozenset()) -> Record:
    """Train a probe's model: gradients of all micro batches averaged in fp32, clipped, and one step."""
    dtype = DTYPES[probe.dtype]
    model = Model(probe.shape).to(dtype)
    # DeepSpeed's master weights are copies of the 16-bit weights.
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    steppers = optimizers(probe.optimizer, masters, muon)
    record = Record([], [], {})
    for step in range(STEPS):
        loss, gradients = _mean_gradients(probe, model, step)
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        factor = min(1.0, probe.clip / (norm + 1e-6)) if probe.clip else 1.0
        for name, weight in masters.items():
            weight.grad = gradients[name] * factor
        for stepper in steppers:
            stepper.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        record.losses.append(loss)
        record.norms.append(norm)
    record.weights = {n: p.detach().float().numpy() for n, p in model.named_parameters()}
    return record


def _mean_gradients(probe: Probe, model: Model, step: int) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of a step's micro batches, and its gradient by name, in fp32."""
    total = 0.0
    scale = FP16_SCALE if probe.dtype == "fp16" else 1.0
    gradients = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    for index in range(probe.micro_batches):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=probe.dtype == "autocast"):
            tokens, labels = batch(step, index)
            loss = model(tokens, labels)
            if probe.shape.auxiliary:
                loss = loss + model.auxiliary_loss(tokens)
        (loss * scale).backward()
        total += float(loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad.float() / (scale * probe.micro_batches)
    return total / probe.micro_batches, gradients
