"""Does a layout compute the same as one device? Run both from the same weights and batches.

The reference is the plain PyTorch loop of `launch/parity/reference.py`; the layout is DeepSpeed's
engine on any number of ranks. `launch/parity/compare.py` measures the difference and sets its
bounds.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.load import recipe_from_dict
from launch.config.schema import HFModel, Recipe
from launch.errors import UserError
from launch.parity.weights import uneven_weights
from launch.training.setup import RunPlan, local_engine, plan_run

if TYPE_CHECKING:
    from torch import Tensor

    from launch.parity.recorder import Recorder
    from launch.training.train_step import StepResult


@dataclass(frozen=True)
class TrainingRecord:
    """A run's data for comparison: values per step, and the final weights in fp32 on the CPU.

    Weights have their canonical names (`launch/checkpoint/full_weights.py`); tied ones appear once.
    On ranks other than rank 0, `weights` is empty.
    """

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    weights: dict[str, "Tensor"]

    @classmethod
    def of(cls, steps: "list[StepResult]", weights: dict[str, "Tensor"]) -> "TrainingRecord":
        """The record of a run's steps and its final weights."""
        return cls(
            [step.loss for step in steps],
            [step.grad_norm for step in steps],
            [step.learning_rate for step in steps],
            weights,
        )


def check_comparable(recipe: Recipe, ds_config: dict[str, Any]) -> None:
    """Reject a run that one device cannot reproduce step by step.

    Raises:
        UserError: for fp16 with a dynamic loss scale, dropout, or an optimizer other than AdamW and Muon;
            it names the override to use.
    """
    check_reproducible(ds_config)
    check_no_dropout(recipe)


def check_reproducible(ds_config: dict[str, Any]) -> None:
    """The part of `check_comparable` that needs the resolved JSON alone.

    Raises:
        UserError: for fp16 with a dynamic loss scale, or an optimizer other than AdamW and Muon.
    """
    import torch

    from launch.ds_json.view import block, compute_dtype, is_enabled, optimizer_block
    from launch.parity.reference_optimizers import OPTIMIZERS

    fixed_scale = block(ds_config, "fp16").get("loss_scale", 0)
    if compute_dtype(ds_config) is torch.float16 and not fixed_scale:
        other = (
            "compare in another precision: --set deepspeed.torch_autocast.dtype=bfloat16"
            if is_enabled(ds_config, "torch_autocast")
            else "use --set deepspeed.fp16.loss_scale=1024"
        )
        raise UserError(
            "fp16.loss_scale: a changing loss scale skips the first steps, so that there is nothing to "
            f"compare step by step; {other}"
        )
    kind, settings = optimizer_block(ds_config)
    if kind.lower() not in OPTIMIZERS:
        raise UserError(
            f"optimizer.type: the reference steps with AdamW or Muon, and this is {kind or 'absent'}; "
            "use --set deepspeed.optimizer.type=AdamW"
        )
    if not settings.get("adam_w_mode", True):
        raise UserError(
            "optimizer.params.adam_w_mode: the reference decays weights as AdamW does; "
            "use --set deepspeed.optimizer.params.adam_w_mode=true"
        )


def check_no_dropout(recipe: Recipe) -> None:
    """The part of `check_comparable` that needs the model alone, and builds one of family hf.

    Raises:
        UserError: for dropout.
    """
    for key, value in _dropouts(recipe).items():
        raise UserError(
            f"{key}: it is {value}, and each rank draws a mask of its own; use --set {key}=0.0"
        )


def _dropouts(recipe: Recipe) -> dict[str, float]:
    if not isinstance(recipe.model, HFModel):
        value = recipe.model.shape.dropout
        return {"model.dropout": value} if value else {}
    from launch.training.build_model import meta_model
    from models.hf import dropouts

    if recipe.model.lora is not None and recipe.model.lora.dropout:
        return {"model.lora.dropout": recipe.model.lora.dropout}
    model: Any = meta_model(recipe)
    return {f"model.changes.{key}": value for key, value in dropouts(model.model.config).items()}


def plan_reference(recipe: Recipe, micro_batch: int | None = None, uneven: bool = False) -> RunPlan:
    """The recipe's run on one device, with this micro batch size (None: the recipe's).

    With `uneven`, its labels are weighted by `uneven_weights`.

    Raises:
        UserError: as `plan_run`.
    """
    weights = uneven_weights(recipe) if uneven else None
    return plan_run(recipe.on_one_device(micro_batch), 1, weights=weights)


def run_reference(
    plan: RunPlan, recorder: "Recorder | None" = None, steps: int | None = None
) -> TrainingRecord:
    """Run the steps on one device, without DeepSpeed; on the GPU if there is one.

    With `recorder`, what they compute on the way is in it afterwards. `steps`: only so many.
    """
    import torch

    from launch.ds_json.view import training_dtype
    from launch.parity.recorder import RecordedReference
    from launch.parity.reference import Reference
    from launch.parity.reference_model import reference_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = reference_model(plan.recipe, training_dtype(plan.ds_config), device)
    settings = model, plan.ds_config, plan.recipe.train
    reference = RecordedReference(recorder, *settings) if recorder else Reference(*settings)
    results = [
        reference.train_step(plan.batch(step)) for step in range(steps or plan.recipe.train.steps)
    ]
    weights = {name: tensor.cpu() for name, tensor in reference.full_weights().items()}
    return TrainingRecord.of(results, weights)


def run_layout(
    values: dict[str, Any],
    scratch: Path,
    uneven: bool = False,
    record_to: Path | None = None,
    steps: int | None = None,
) -> TrainingRecord:
    """Run the recipe's steps as one rank of a layout; every rank calls it in its own process.

    With `record_to`, a folder, each rank writes there what it computes on its way
    (`layout_recorder.py`). `steps`: only so many. The other arguments and the errors are those of
    `launch.training.setup.local_engine` and `plan_reference`.
    """
    loss_weights = uneven_weights(recipe_from_dict(values)) if uneven else None
    with local_engine(values, scratch, loss_weights) as local:
        from launch.checkpoint.full_weights import full_weights
        from launch.training.train_step import train_step

        recorder = None
        if record_to:
            from launch.parity.layout_recorder import LayoutRecorder

            recorder = LayoutRecorder(local)
        results = []
        for step in range(steps or local.plan.recipe.train.steps):
            if recorder:
                recorder.begin(step + 1)
            results.append(train_step(local.engine, local.batch(step)))
            if recorder:
                recorder.end(results[-1])
        if recorder and record_to:
            recorder.save(record_to, local.ranks.rank)
        weights: dict[str, Tensor] = {}
        for name, tensor in full_weights(local.engine):
            if local.ranks.is_main:
                weights[name] = tensor.to("cpu", copy=True)
    return TrainingRecord.of(results, weights)


def write_layout_record(values: dict[str, Any], file: Path, uneven: bool = False) -> None:
    """Write the result of `run_layout` to a file: weights are too large for a pipe."""
    trace = run_layout(values, file.parent, uneven)

    import torch

    if os.environ["RANK"] == "0":
        torch.save(vars(trace), file)


def write_recording(values: dict[str, Any], folder: Path, uneven: bool, steps: int) -> None:
    """Run a rank's first steps, and write what it computes on its way into a folder."""
    run_layout(values, folder, uneven, folder, steps)


def read_record(file: Path) -> TrainingRecord:
    """Read a record written by `write_layout_record`."""
    import torch

    return TrainingRecord(**torch.load(file, weights_only=True))
