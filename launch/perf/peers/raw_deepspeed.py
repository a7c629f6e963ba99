"""DeepSpeed as its documentation has it: `initialize` with the recipe's JSON, `engine.compile()`.

Without what the project adds: its patches, its layers, its compiled parts, its loop.
"""

import deepspeed
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from launch.perf.peers.job import Job


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    model = job.plain_gpt().to(job.dtype)
    engine = deepspeed.initialize(
        model=model,
        model_parameters=job.groups(model),
        config=job.plan.ds_config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, job.learning_rate_factor),
        dist_init_required=False,
    )[0]
    engine.compile()

    def step(number: int) -> Tensor:
        loss = torch.zeros((), device=job.device)
        for tokens, labels in job.micro_batches(number, job.ranks.rank):
            micro_loss = engine(tokens, labels)
            engine.backward(micro_loss)
            engine.step()
            loss += micro_loss.detach()
        return loss / job.accumulation

    job.train(step)
