"""Plain PyTorch on one device, without DeepSpeed: the reference that every layout must match.

The code is simple enough to verify by reading: AdamW with decoupled decay (arXiv:1711.05101), the
mean loss over the labels of the global batch, and clipping by the global norm. The loss is torch's
own, computed from the model's logits; the layouts' loss code is not used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.checkpoint.full_weights import canonical_names
from launch.config.schema import Train
from launch.data.batch import Batch, MicroBatch
from launch.ds_json.view import (
    block,
    compute_dtype,
    is_enabled,
    optimizer_block,
    training_dtype,
)
from launch.training.lr_schedule import learning_rate_factor
from launch.training.optimizer import parameter_groups
from launch.training.train_step import StepResult


def _adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=float(settings["lr"]),
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


# Keyed by the optimizer type in a DeepSpeed JSON, in lower case. DeepSpeed's "Adam" is also AdamW.
OPTIMIZERS = {"adam": _adamw, "adamw": _adamw}


class Reference:
    """The training loop on one device. In bf16 and fp16, it also keeps fp32 master weights.

    Mixed precision works as in DeepSpeed (arXiv:1710.03740): the model computes in 16 bits,
    gradients are summed and applied in fp32, and the model's weights are the rounded master
    weights. In fp16, the loss is multiplied by a fixed scale so that small gradients do not round
    to zero. With the JSON's torch_autocast, weights are fp32 and only the matrix products are in
    bf16.
    """

    def __init__(self, model: nn.Module, ds_config: dict[str, Any], train: Train) -> None:
        self.model, self.train = model, train
        self.step_number = 0
        self.loss = _loss
        self.clip = float(ds_config["gradient_clipping"])
        self.mixed = training_dtype(ds_config) is not torch.float32
        half = training_dtype(ds_config) is torch.float16
        self.loss_scale = float(block(ds_config, "fp16")["loss_scale"]) if half else 1.0
        self.weights = list(model.parameters())
        self.autocast = torch.autocast(
            self.weights[0].device.type,
            compute_dtype(ds_config),
            enabled=is_enabled(ds_config, "torch_autocast"),
        )
        self.masters = (
            [nn.Parameter(w.detach().float()) for w in self.weights] if self.mixed else self.weights
        )
        groups = parameter_groups(model)
        master_of = dict(zip(self.weights, self.masters, strict=True))
        for group in groups:
            group["params"] = [master_of[weight] for weight in group["params"]]
        kind, settings = optimizer_block(ds_config)
        self.learning_rate = float(settings["lr"])
        self.optimizer = OPTIMIZERS[kind.lower()](groups, settings)

    def compile(self) -> None:
        """Compile the forward pass, loss included, and the backward pass."""
        self.loss = torch.compile(_loss)

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step on a whole global batch, one micro batch at a time."""
        device = self.weights[0].device
        learning_rate = self.learning_rate * learning_rate_factor(
            self.train.schedule, self.step_number, self.train.steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        counted = batch.labels.numel() if batch.loss_weights is None else batch.loss_weights.sum()
        loss_sum = 0.0
        for micro_batch in batch.micro_batches():
            with self.autocast:
                loss = self.loss(self.model, micro_batch.to(device)) / float(counted)
            (loss * self.loss_scale).backward()
            loss_sum += loss.item()
            if self.mixed:
                self._move_gradients_to_masters()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip) if self.clip else None
        if norm is None:
            norm = torch.nn.utils.get_total_norm(
                [m.grad for m in self.masters if m.grad is not None]
            )
        self.optimizer.step()
        if self.mixed:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        self.step_number += 1
        return StepResult(loss_sum, float(norm), learning_rate)

    def _move_gradients_to_masters(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                gradient = weight.grad.float() / self.loss_scale
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter by its canonical name, in fp32; tied ones once."""
        names = canonical_names(self.model)
        return {n: m.detach().float() for n, m in zip(names, self.masters, strict=True)}


def _loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The weighted sum of a micro batch's losses, in fp32."""
    logits = model(batch.tokens, positions=batch.positions)
    scores, labels = logits.float().flatten(0, 1), batch.labels.flatten()
    if batch.loss_weights is None:
        return F.cross_entropy(scores, labels, reduction="sum")
    losses = F.cross_entropy(scores, labels, reduction="none")
    return (losses * batch.loss_weights.flatten()).sum()
