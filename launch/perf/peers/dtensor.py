"""PyTorch's tensor parallelism: DTensor, `parallelize_module`, a loss over sharded logits, compiled blocks.

All ranks are one tensor group. Weights are in the JSON's precision; fp32 copies of this rank's shards get
the gradients and the optimizer's steps, as in Megatron.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from launch.perf.peers.job import Job
from launch.perf.peers.plain_gpt import PlainGPT


def shard(model: PlainGPT, mesh: DeviceMesh, sequence: bool, tied: bool) -> None:
    """Split the layers over the ranks; with `sequence`, the tokens between them too."""
    between = Shard(1) if sequence else Replicate()
    norm = SequenceParallel() if sequence else None
    for block in model.blocks:
        plan: dict[str, Any] = {
            "qkv": ColwiseParallel(input_layouts=between),
            "out": RowwiseParallel(output_layouts=between),
            "up": ColwiseParallel(input_layouts=between),
            "down": RowwiseParallel(output_layouts=between),
        }
        parallelize_module(block, mesh, plan | ({"norm1": norm, "norm2": norm} if norm else {}))
    ends: dict[str, Any] = {
        "token": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(
            input_layouts=between, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    if norm:
        ends["norm"] = norm
        # A rank adds the positions of its own tokens.
        ends["position"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(0)
        )
    parallelize_module(model, mesh, ends)
    if tied:
        model.head.weight = model.token.weight


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterWeights:
    """fp32 copies of this rank's weights, with the sum of the gradients of all micro batches.

    A weight that every rank has whole, but applies to tokens of its own, has a part of its gradient on each
    rank; those are summed once a step, in one message.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = group
        self.weights = list(model.parameters())
        self.masters = [nn.Parameter(local(w).detach().float().clone()) for w in self.weights]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        self.partial: set[int] = set()
        for index, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            master.grad = self.gradients[index]
            weight.register_post_accumulate_grad_hook(
                lambda weight, index=index: self._add(weight, index)
            )

    def _add(self, weight: Tensor, index: int) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if isinstance(gradient, DTensor) and isinstance(weight, DTensor):
            if gradient.placements[0].is_partial():
                self.partial.add(index)
            elif gradient.placements != weight.placements:
                gradient = gradient.redistribute(placements=weight.placements)
        self.gradients[index] += local(gradient)

    def clip(self, largest: float) -> None:
        """Sum what is in parts, and scale all gradients to a global norm of at most `largest`."""
        gradients = self.gradients
        if self.partial:
            parts = [gradients[index] for index in sorted(self.partial)]
            whole = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(whole, group=self.group)
            sizes = [part.numel() for part in parts]
            torch._foreach_copy_(
                parts, [s.view_as(p) for s, p in zip(whole.split(sizes), parts, strict=True)]
            )
        if not largest:
            return
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        sharded = [isinstance(w, DTensor) and w.placements[0].is_shard() for w in self.weights]
        mine = torch.tensor(sharded, device=squares.device)
        of_shards = squares[mine].sum()
        dist.all_reduce(of_shards, group=self.group)
        norm = (of_shards + squares[~mine].sum()).sqrt()
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def round_into_weights(self) -> None:
        """Copy the stepped weights into the model's, and forget the gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            local(weight).copy_(master)
        torch._foreach_zero_(self.gradients)


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    model = job.plain_gpt().to(job.dtype)
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    shard(model, mesh, job.plan.recipe.parallel.sequence, job.config.tied)
    for block in model.blocks:
        block.compile()
    masters = MasterWeights(model, mesh.get_group())
    optimizer = job.adamw(
        [
            {"params": [m for m in masters.masters if m.dim() > 1]},
            {"params": [m for m in masters.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
    )

    def step(number: int) -> Tensor:
        job.set_learning_rate(optimizer, number)
        loss = torch.zeros((), device=job.device)
        batches = job.micro_batches(number, 0)
        for tokens, labels in batches:
            with loss_parallel():
                micro_loss = model(tokens, labels) / len(batches)
                micro_loss.backward()
            whole = micro_loss.detach()
            loss += whole.full_tensor() if isinstance(whole, DTensor) else whole
        masters.clip(job.clip)
        optimizer.step()
        masters.round_into_weights()
        return loss

    job.train(step)
