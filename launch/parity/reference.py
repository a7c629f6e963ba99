"""Plain PyTorch on one device, without DeepSpeed: the reference that every layout must match.

The code is simple enough to verify by reading: the optimizers of `reference_optimizers.py`, the
mean loss over the labels of the global batch, and clipping by the global norm. It shares no code
with the layouts that can be wrong on both sides at once: the loss is torch's or transformers' own,
the groups with and without weight decay are made here, and `reference_model.py` says which model
runs. What it does share has tests of its own: the batches, the learning rate's schedule, the reading
of the JSON, and a GPT's layers and initial weights.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
    switched_on,
    training_dtype,
)
from launch.parity.reference_model import is_pretrained_model
from launch.parity.reference_optimizers import OPTIMIZERS
from launch.training.lr_schedule import learning_rate_factor
from launch.training.train_step import StepResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reference:
    """The training loop on one device. In bf16 and fp16, it also keeps fp32 master weights.

    Mixed precision works as in DeepSpeed (arXiv:1710.03740): the model computes in 16 bits,
    gradients are summed and applied in fp32, and the model's weights are the rounded master
    weights. In fp16, the loss is multiplied by a fixed scale so that small gradients do not round
    to zero. With the JSON's torch_autocast, weights are fp32 and only the matrix products are in
    bf16. Where the JSON keeps master weights or moments in bf16, they are rounded after each step, which
    itself computes in fp32.
    """

    def __init__(self, model: nn.Module, ds_config: dict[str, Any], train: Train) -> None:
        self.model, self.train = model, train
        self.step_number = 0
        self.loss = _loss
        self.clip = float(ds_config["gradient_clipping"])
        self.mixed = training_dtype(ds_config) is not torch.float32
        half = training_dtype(ds_config) is torch.float16
        self.loss_scale = float(block(ds_config, "fp16")["loss_scale"]) if half else 1.0
        low = block(ds_config, "bf16")
        self.rounds_weights = switched_on(low.get("bf16_master_weights_and_grads"))
        self.rounds_moments = switched_on(low.get("bf16_optimizer_states"))
        self.weights = list(model.parameters())
        self.autocast = torch.autocast(
            self.weights[0].device.type,
            compute_dtype(ds_config),
            enabled=is_enabled(ds_config, "torch_autocast"),
        )
        self.masters = (
            [nn.Parameter(w.detach().float()) for w in self.weights] if self.mixed else self.weights
        )
        kind, settings = optimizer_block(ds_config)
        named = dict(zip(canonical_names(model), self.masters, strict=True))
        self.optimizers = OPTIMIZERS[kind.lower()](named, settings)
        self.groups = [group for each in self.optimizers for group in each.param_groups]
        self.learning_rates = [float(group["lr"]) for group in self.groups]

    def compile(self) -> None:
        """Compile the forward pass, loss included, and the backward pass."""
        self.loss = torch.compile(_loss)

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step on a whole global batch, one micro batch at a time."""
        device = self.weights[0].device
        factor = learning_rate_factor(self.train.schedule, self.step_number, self.train.steps)
        for group, learning_rate in zip(self.groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        counted = batch.labels.numel() if batch.loss_weights is None else batch.loss_weights.sum()
        loss_sum = 0.0
        for micro_batch in batch.micro_batches():
            with self.autocast:
                loss = self.loss(self.model, micro_batch.to(device)) / float(counted)
            (loss * self.loss_scale).backward()
            loss_sum += loss.item()
            if self.mixed:
                self._move_gradients_to_masters()
        norm = self.clip_gradients()
        if self.rounds_weights:
            _round(master.grad for master in self.masters)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.rounds_weights:
            _round(self.masters)
        if self.rounds_moments:
            _round(value for master in self.masters for value in self.state_of(master).values())
        if self.mixed:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        self.step_number += 1
        return StepResult(loss_sum, float(norm), self.groups[0]["lr"])

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """What the optimizer keeps of a weight."""
        return {key: v for each in self.optimizers for key, v in each.state.get(master, {}).items()}

    def clip_gradients(self) -> Tensor:
        """Clip the gradients by their global norm, and return the norm before that."""
        if self.clip:
            return torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])

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


def _round(tensors: Iterable[Tensor | None]) -> None:
    """Round tensors to bf16 where they are; counts of steps (of no dimension) stay."""
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None and tensor.dim():
                tensor.copy_(tensor.bfloat16())


def _loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The weighted sum of a micro batch's losses, in fp32."""
    if is_pretrained_model(model):
        return _loss_by_transformers(model, batch)
    return _cross_entropy(model(batch.tokens, positions=batch.positions), batch)


def _loss_by_transformers(model: "PreTrainedModel", batch: MicroBatch) -> Tensor:
    """Its own mean loss times the labels that it is a mean of; with a router loss, if there is one."""
    counted, weights = float(batch.labels.numel()), batch.loss_weights
    labels = {"labels": batch.labels, "shift_labels": batch.labels}  # shifted already
    output = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **labels)
    loss: Tensor = output.loss
    if weights is None:
        return loss * counted
    # Its loss has no weights: the cross-entropy is replaced, and what was added to it stays.
    mean = F.cross_entropy(output.logits.float().flatten(0, 1), batch.labels.flatten())
    return _cross_entropy(output.logits, batch) + (loss - mean) * weights.sum()


def _cross_entropy(logits: Tensor, batch: MicroBatch) -> Tensor:
    scores, labels = logits.float().flatten(0, 1), batch.labels.flatten()
    if batch.loss_weights is None:
        return F.cross_entropy(scores, labels, reduction="sum")
    losses = F.cross_entropy(scores, labels, reduction="none")
    return (losses * batch.loss_weights.flatten()).sum()
