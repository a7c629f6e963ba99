"""PyTorch's FSDP2: weights, gradients and optimizer sharded over the ranks, each block compiled.

Weights are in fp32, gathered in bf16 for the forward and the backward pass; gradients are summed in fp32.
The peer of ZeRO-3.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from launch.perf.peers.job import Job


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    model = job.plain_gpt()
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=job.dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = job.adamw(job.groups(model))

    def step(number: int) -> Tensor:
        job.set_learning_rate(optimizer, number)
        loss = torch.zeros((), device=job.device)
        batches = job.micro_batches(number, job.ranks.rank)
        for index, (tokens, labels) in enumerate(batches):
            sharded.set_requires_gradient_sync(index == len(batches) - 1)
            micro_loss = model(tokens, labels) / len(batches)
            micro_loss.backward()
            loss += micro_loss.detach()
        job.update(model, optimizer)
        return loss

    job.train(step)
