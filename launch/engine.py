"""From a recipe to a DeepSpeed engine, and one training step on it."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from launch.distributed import Ranks
from launch.errors import UserError
from launch.recipe import HFModel, Recipe
from launch.schedule import learning_rate_factor
from models.gpt import GPT, initialize


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: means over the global batch, the norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype of forward and backward that a DeepSpeed configuration asks for."""
    if ds_config.get("bf16", {}).get("enabled", False):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled", False):
        return torch.float16
    return torch.float32


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype of the matrix products: as `training_dtype`, or what torch_autocast does them in."""
    autocast = ds_config.get("torch_autocast") or {}
    if autocast.get("enabled"):
        name = str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
        return torch.float16 if name in ("float16", "fp16", "half") else torch.bfloat16
    return training_dtype(ds_config)


@contextmanager
def _new_parameters(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    # Made in their final dtype and place: a 6.7B model in fp32 would need 27 GB on the way.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(recipe: Recipe, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The recipe's model with its first weights, whole, on one device ("meta": shapes only).

    Raises:
        UserError: where a `family: hf` model cannot be found, read or changed as asked.
    """
    spec = recipe.model
    if isinstance(spec, HFModel):
        return _build_hf(spec, recipe.train.seed, dtype, device)
    with _new_parameters(dtype, device):
        model = GPT(spec.gpt_config(), spec.checkpoint_activations)
    if torch.device(device).type != "meta":
        initialize(model, recipe.train.seed)
    return model


def _build_hf(
    spec: HFModel, seed: int, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    from models.hf import HFCausalLM, from_config, from_pretrained, read_config

    try:
        config = read_config(spec.path, spec.changes)
        meta = torch.device(device).type == "meta"
        if spec.pretrained and not meta:
            model = from_pretrained(spec.path, config).to(device=device, dtype=dtype)
        else:
            # On the CPU whatever the device: its generator gives every rank and the reference the
            # same numbers.
            torch.manual_seed(seed)
            with _new_parameters(torch.float32, "meta" if meta else "cpu"):
                model = from_config(config)
            model = model.to(device=device, dtype=dtype)
        return HFCausalLM(model, spec.checkpoint_activations)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: {spec.path} is not usable: {reason}") from None


def build_partitioned_model(recipe: Recipe, ds_config: dict[str, Any]) -> nn.Module:
    """A GPT that is never whole on a rank: ZeRO-3 cuts each parameter as its layer is made."""
    spec = recipe.model
    assert not isinstance(spec, HFModel)

    def gather(parameter: nn.Parameter) -> AbstractContextManager[object]:
        whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return whole

    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = GPT(spec.gpt_config(), spec.checkpoint_activations)
    initialize(model, recipe.train.seed, gather)
    return model


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, which decay with the JSON's weight_decay, and vectors (norms, biases), which do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        whole_shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(whole_shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(recipe: Recipe, ds_config: dict[str, Any], ranks: Ranks) -> DeepSpeedEngine:
    """The recipe's model on DeepSpeed's engine, ready for `train_step`."""
    if zero_stage(ds_config) == 3 and not isinstance(recipe.model, HFModel):
        model = build_partitioned_model(recipe, ds_config)
    else:
        model = build_model(recipe, training_dtype(ds_config), ranks.device)
    train = recipe.train

    def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(
            optimizer, lambda step: learning_rate_factor(train.schedule, step, train.steps)
        )

    engine: DeepSpeedEngine = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=ds_config,
        lr_scheduler=schedule,
        dist_init_required=False,
    )[0]
    _undo_step_taken_at_construction(engine)
    if train.compile:
        engine.compile()
    return engine


def _undo_step_taken_at_construction(engine: DeepSpeedEngine) -> None:
    """Mend DeepSpeed 0.19.8 at stage 0 in bf16 or fp16 (and nowhere else).

    To allocate Adam's state, FP16_UnfusedOptimizer steps on zero gradients. That decays the weights
    once, and the first real step then has the bias correction of a second one: its update is 0.73
    times what it should be (betas 0.9, 0.95). The model's own weights are still the first ones.
    """
    wrapper = engine.optimizer
    if not isinstance(wrapper, FP16_UnfusedOptimizer):
        return
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def train_step(engine: DeepSpeedEngine, batch: Tensor) -> Step:
    """One optimizer step on this rank's part of a global batch.

    `batch` is `[accumulation, micro_batch, sequence + 1]`: each row's tokens predict the same row
    one place on. DeepSpeed divides each micro batch's loss by the accumulation steps, and averages
    the gradients over the data parallel ranks.
    """
    batch = batch.to(engine.device)
    learning_rate = float(engine.get_lr()[0])
    loss_sum = torch.zeros((), device=engine.device)
    norm = None
    for sequences in batch:
        loss = engine(sequences[:, :-1], sequences[:, 1:])
        loss_sum += loss.detach()
        engine.backward(loss)
        if (
            isinstance(engine.optimizer, torch.optim.Optimizer)
            and engine.is_gradient_accumulation_boundary()
        ):
            # Stage 0 in fp32 runs torch's optimizer bare, and DeepSpeed keeps no norm of it.
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in engine.module.parameters() if p.grad is not None]
            )
        engine.step()
    loss_sum /= len(batch)
    dist.all_reduce(loss_sum, group=engine.data_parallel_group)
    if norm is None:
        norm = engine.get_global_grad_norm()
    return Step(
        loss=loss_sum.item() / dist.get_world_size(engine.data_parallel_group),
        grad_norm=math.nan if norm is None else float(norm),
        learning_rate=learning_rate,
        skipped=not engine.was_step_applied(),
    )


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, share: list[tuple[Tensor, int]]) -> float:
    """Mean loss per token over all ranks' held-out sequences, as shared out by `held_out_share`.

    `share` holds micro batches `[n, sequence + 1]` with the number of their rows that count.
    """
    engine.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for rows, counted in share:
        sequences = rows.to(engine.device)
        loss = engine(sequences[:, :-1], sequences[:, 1:])
        totals += torch.tensor([loss.item() * counted, counted], device=engine.device)
    dist.all_reduce(totals, group=engine.data_parallel_group)
    engine.train()
    return float(totals[0] / totals[1])
