"""Plain PyTorch: a compiled model under autocast, DistributedDataParallel, fused AdamW.

Every rank has the whole model, its gradients and the optimizer's state in fp32.
"""

import contextlib

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launch.perf.peers.job import Job


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    model = job.plain_gpt()
    optimizer = job.adamw(job.groups(model))
    model.compile()
    parallel = None
    if job.world_size > 1:
        devices = [job.device] if job.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    network = model if parallel is None else parallel
    mixed = torch.autocast(job.device.type, job.dtype, enabled=job.dtype is not torch.float32)

    def step(number: int) -> Tensor:
        job.set_learning_rate(optimizer, number)
        loss = torch.zeros((), device=job.device)
        batches = job.micro_batches(number, job.ranks.rank)
        for index, (tokens, labels) in enumerate(batches):
            # Gradients cross the ranks with the last micro batch alone.
            last = index == len(batches) - 1
            with contextlib.nullcontext() if parallel is None or last else parallel.no_sync():
                with mixed:
                    micro_loss = network(tokens, labels) / len(batches)
                micro_loss.backward()
            loss += micro_loss.detach()
        job.update(model, optimizer)
        return loss

    job.train(step)
