"""Hugging Face's Trainer with DeepSpeed: transformers' GPT-2, and the recipe's JSON in its hf/ twin.

Eager, as Trainer runs by default.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from launch.config.resolve import merge
from launch.config.schema import Recipe
from launch.ds_json.strict_json import load_json
from launch.ds_json.view import optimizer_block
from launch.hf.config import to_transformers
from launch.hf.tensors import correspondences
from launch.paths import ROOT
from launch.perf.peers.job import Job
from models.init_weights import initialize_parameters

Rows = dict[str, Tensor]


def twin_of(recipe: Recipe) -> dict[str, Any]:
    """The JSON in ds_configs/hf/ that stands beside the recipe's, with the recipe's changes of ZeRO."""
    path = ROOT / "ds_configs" / "hf" / Path(recipe.deepspeed["config"]).name
    kept = {"zero_optimization": recipe.deepspeed.get("zero_optimization", {})}
    return merge(load_json(path), kept)


def gpt2(job: Job) -> GPT2LMHeadModel:
    """Transformers' GPT-2 in fp32 with the recipe's initial weights."""
    family, config = to_transformers(job.config, "gpt2")
    config.use_cache = False
    model = GPT2LMHeadModel(config)
    theirs: dict[str, Tensor] = {}
    for each in correspondences(family, job.config):
        ours = torch.nn.Parameter(torch.empty(each.shape, device=job.device))
        initialize_parameters([(each.ours, ours)], job.config, job.plan.recipe.train.seed)
        theirs |= each.to_theirs(ours.detach().to(job.dtype).float().cpu())
    model.load_state_dict(theirs, strict=False)  # a tied head is not among them
    return model


class Batches(Dataset[Rows]):
    """This rank's micro batches of all steps, in their order."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __len__(self) -> int:
        return self.job.steps * self.job.accumulation

    def __getitem__(self, index: int) -> Rows:
        step, micro = divmod(index, self.job.accumulation)
        batch = self.job.plan.batch(step, self.job.ranks.rank)
        labels = batch.labels[micro]
        return {"input_ids": batch.tokens[micro], "labels": labels, "shift_labels": labels}


class TimedTrainer(Trainer):
    """Trainer with the job's batches and learning rates; it keeps each step's loss on the device."""

    def __init__(self, job: Job, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.job = job
        self.step_loss = torch.zeros((), device=job.device)

    def get_train_dataloader(self) -> DataLoader[Rows]:
        """Micro batches as they are, in order."""
        return DataLoader(Batches(self.job), batch_size=None)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """The recipe's schedule."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.job.learning_rate_factor)
        return self.lr_scheduler

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Add up the losses of a step."""
        loss: Tensor = super().training_step(*arguments, **named)
        self.step_loss += loss
        return loss


class Marks(TrainerCallback):
    """Marks the end of each step."""

    trainer: TimedTrainer

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        """Before the first step."""
        self.trainer.job.watch.mark()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """After each step."""
        job = self.trainer.job
        job.losses.append(self.trainer.step_loss.clone())
        self.trainer.step_loss.zero_()
        job.watch.mark()


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    _, settings = optimizer_block(job.plan.ds_config)
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=twin_of(job.plan.recipe),
            max_steps=job.steps,
            per_device_train_batch_size=job.plan.layout.micro_batch,
            gradient_accumulation_steps=job.accumulation,
            learning_rate=float(settings["lr"]),
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            adam_epsilon=settings["eps"],
            weight_decay=settings["weight_decay"],
            max_grad_norm=job.clip,
            optim="adamw_torch_fused",
            bf16=job.dtype is torch.bfloat16,
            use_cpu=job.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        marks.trainer = TimedTrainer(
            job, model=gpt2(job), args=arguments, train_dataset=Batches(job), callbacks=[marks]
        )
        marks.trainer.train()
