"""What every peer is to train: the recipe's model, batches, initial weights, optimizer and steps."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launch.config.schema import GPTModel
from launch.ds_json.view import optimizer_block, training_dtype
from launch.perf.bench.watch import Watch
from launch.perf.peers.plain_gpt import PlainGPT, by_head, our_names
from launch.training.lr_schedule import learning_rate_factor
from launch.training.setup import RunPlan
from models.config import GPTConfig
from models.init_weights import initialize_parameters

if TYPE_CHECKING:
    from launch.runtime.process_group import RankInfo


@dataclass
class Job:
    """A rank's share of the work.

    Attributes:
        plan: the recipe's layout, JSON and batches.
        ranks: this rank, and the device that it runs on.
        watch: marks the end of each step.
        losses: of each step, a mean over the global batch, once it has been trained.
    """

    plan: RunPlan
    ranks: "RankInfo"
    watch: Watch
    losses: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.ranks.device

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.ranks.world_size

    @property
    def config(self) -> GPTConfig:
        """The model's sizes."""
        assert isinstance(self.plan.recipe.model, GPTModel)
        return self.plan.recipe.model.shape

    @property
    def dtype(self) -> torch.dtype:
        """What the JSON computes in."""
        return training_dtype(self.plan.ds_config)

    @property
    def steps(self) -> int:
        """Optimizer steps to run."""
        return self.plan.recipe.train.steps

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in a step."""
        return self.plan.layout.accumulation

    @property
    def clip(self) -> float:
        """The largest norm that the gradients keep; 0: any."""
        return float(self.plan.ds_config["gradient_clipping"])

    def plain_gpt(self) -> PlainGPT:
        """`PlainGPT` in fp32 with the recipe's initial weights, which begin as rounded as the recipe's."""
        with torch.device(self.device):
            model = PlainGPT(self.config)
        here = dict(model.named_parameters())
        names = our_names(self.config)
        drawn = ((names[name], parameter) for name, parameter in here.items())
        initialize_parameters(drawn, self.config, self.plan.recipe.train.seed)
        with torch.no_grad():
            for name, parameter in here.items():
                if ".qkv." in name:
                    parameter.copy_(by_head(parameter, self.config))
                parameter.copy_(parameter.to(self.dtype))
        return model.train()

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters that decay, matrices, and those that do not."""
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """Fused AdamW with the JSON's settings."""
        _, settings = optimizer_block(self.plan.ds_config)
        return torch.optim.AdamW(
            groups,
            lr=float(settings["lr"]),
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            fused=True,
        )

    def learning_rate_factor(self, step: int) -> float:
        """The multiplier of the JSON's learning rate at a step, from 0."""
        return learning_rate_factor(self.plan.recipe.train.schedule, step, self.steps)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set a step's learning rate, as the recipe's schedule has it."""
        _, settings = optimizer_block(self.plan.ds_config)
        for group in optimizer.param_groups:
            group["lr"] = float(settings["lr"]) * self.learning_rate_factor(step)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients as the JSON has it, take a step, and forget them."""
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()

    def micro_batches(self, step: int, data_rank: int) -> list[tuple[Tensor, Tensor]]:
        """A data parallel rank's tokens and labels of a step, each `[micro_batch, sequence]`."""
        batch = self.plan.batch(step, data_rank)
        moved = (each.to(self.device) for each in batch.micro_batches())
        return [(each.tokens, each.labels) for each in moved]

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """On a GPU, cuDNN's attention where it can, then flash; elsewhere what torch chooses."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [
            SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]  # fmt: skip
        kernels: contextlib.AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
        return kernels

    def train(self, step: Callable[[int], Tensor]) -> None:
        """Run the steps; `step` returns the step's loss on this rank's device, and does not wait for it."""
        self.watch.mark()
        with self.attention():
            for number in range(self.steps):
                self.losses.append(step(number).detach())
                self.watch.mark()
