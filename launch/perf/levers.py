"""Levers: named changes of a recipe that may make it faster or smaller, each to be timed by itself.

A lever is a set of `--set` overrides. It applies to a recipe that it changes: `compile-on` does not to one
that is compiled. A new lever is an entry of `LEVERS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.ds_json.view import is_enabled, zero_stage
from launch.errors import UserError

ZERO = "deepspeed.zero_optimization"


@dataclass(frozen=True)
class Setting:
    """A recipe as it stands, which a lever is to change: with its layout and its resolved JSON."""

    recipe: Recipe
    layout: Layout
    ds_config: dict[str, object]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.ds_config)


@dataclass(frozen=True)
class Lever:
    """A named change.

    Attributes:
        name: as on the command line.
        says: what it does, in a line.
        overrides: the keys to set, given the recipe as it stands.
        why_not: why it has no effect on a recipe, or None where it has.
    """

    name: str
    says: str
    overrides: Callable[[Setting], tuple[str, ...]]
    why_not: Callable[[Setting], str | None] = lambda setting: None


def _set(*overrides: str) -> Callable[[Setting], tuple[str, ...]]:
    return lambda setting: overrides


def _stages(*stages: int) -> Callable[[Setting], str | None]:
    def why_not(setting: Setting) -> str | None:
        named = " and ".join(map(str, stages))
        return (
            None if setting.stage in stages else f"DeepSpeed reads it at ZeRO stages {named} alone"
        )

    return why_not


def _tensor_ranks(setting: Setting) -> str | None:
    return None if setting.recipe.parallel.tensor > 1 else "parallel.tensor is 1"


def _two_tensor_ranks(setting: Setting) -> str | None:
    return None if setting.recipe.parallel.tensor == 2 else "parallel.tensor is not 2"


def _stages_of_a_pipeline(setting: Setting) -> str | None:
    return None if setting.recipe.parallel.pipeline > 1 else "parallel.pipeline is 1"


def _bf16_optimizer(setting: Setting) -> str | None:
    if setting.stage == 1 and is_enabled(setting.ds_config, "bf16"):
        return None
    return "DeepSpeed reads it at ZeRO stage 1 in bf16 alone"


def _micro_batch(factor: float) -> Callable[[Setting], tuple[str, ...]]:
    return lambda setting: (f"train.micro_batch_size={int(setting.layout.micro_batch * factor)}",)


def _halves(setting: Setting) -> str | None:
    return None if setting.layout.micro_batch > 1 else "the micro batch is one sequence"


def _doubles(setting: Setting) -> str | None:
    if setting.layout.accumulation % 2:
        return "a rank has an odd number of micro batches"
    return None


LEVERS = (
    Lever("compile-on", "torch.compile", _set("train.compile=true")),
    Lever("compile-off", "no torch.compile", _set("train.compile=false")),
    Lever(
        "graphs-on",
        "torch.compile with CUDA graphs: a pass is recorded, and launched as one",
        _set("train.compile=true", "train.cuda_graphs=true"),
    ),
    Lever("graphs-off", "each kernel is launched by itself", _set("train.cuda_graphs=false")),
    Lever(
        "recompute-on",
        "blocks keep their inputs alone and are recomputed in the backward pass",
        _set("model.checkpoint_activations=true"),
    ),
    Lever(
        "recompute-off",
        "blocks keep their activations for the backward pass",
        _set("model.checkpoint_activations=false"),
    ),
    Lever(
        "checkpoints-on-cpu",
        "blocks' inputs wait in host memory for the backward pass",
        _set("model.checkpoint_activations=true", "model.cpu_checkpointing=true"),
    ),
    Lever(
        "mlp-in-8-chunks",
        "MLPs work on an eighth of a sequence at a time, and again in the backward pass",
        _set("model.mlp_chunks=8"),
    ),
    Lever(
        "loss-in-8-chunks",
        "logits of an eighth of a sequence at a time, computed again in the backward pass",
        _set("model.loss_chunks=8"),
    ),
    Lever(
        "loss-at-once",
        "all logits at once, for the backward pass too",
        _set("model.loss_chunks=1"),
    ),
    Lever("micro-batch-half", "half as many sequences a pass", _micro_batch(0.5), _halves),
    Lever("micro-batch-double", "twice as many sequences a pass", _micro_batch(2), _doubles),
    Lever(
        "sequence-on",
        "sequence parallelism: tensor ranks share the tokens between the layers too",
        _set("parallel.sequence=true"),
        _tensor_ranks,
    ),
    Lever(
        "sequence-off",
        "every tensor rank has all tokens between the layers",
        _set("parallel.sequence=false"),
        _tensor_ranks,
    ),
    Lever(
        "copies-on",
        "two tensor ranks' sums are copies between their GPUs, and no kernels of NCCL",
        _set("parallel.copy_engine=true"),
        _two_tensor_ranks,
    ),
    Lever(
        "copies-off",
        "tensor ranks' sums are all-reduces of NCCL",
        _set("parallel.copy_engine=false"),
        _tensor_ranks,
    ),
    Lever(
        "schedule-1f1b",
        "one forward, one backward pass in turns",
        _set("parallel.schedule=1f1b", "parallel.model_chunks=1"),
        _stages_of_a_pipeline,
    ),
    Lever(
        "schedule-interleaved",
        "two model chunks a stage: the pipeline fills and drains in half the time",
        _set("parallel.schedule=interleaved", "parallel.model_chunks=2"),
        _stages_of_a_pipeline,
    ),
    Lever(
        "schedule-gpipe",
        "all forward passes, then all backward passes",
        _set("parallel.schedule=gpipe", "parallel.model_chunks=1"),
        _stages_of_a_pipeline,
    ),
    Lever(
        "partition-parameters",
        "stages with as many parameters",
        _set("parallel.partition=parameters"),
        _stages_of_a_pipeline,
    ),
    Lever(
        "partition-flops",
        "stages that compute as long, the output projection included",
        _set("parallel.partition=flops"),
        _stages_of_a_pipeline,
    ),
    Lever(
        "gradients-at-once",
        "each gradient is added to its fp32 sum as it comes",
        _set("deepspeed.bf16.immediate_grad_update=true"),
        _bf16_optimizer,
    ),
    Lever(
        "gradients-after",
        "gradients are added to their fp32 sums after each backward pass",
        _set("deepspeed.bf16.immediate_grad_update=false"),
        _bf16_optimizer,
    ),
    Lever(
        "overlap-on",
        "gradients are reduced on a stream of their own during the backward pass",
        _set(f"{ZERO}.overlap_comm=true"),
        _stages(2, 3),
    ),
    Lever(
        "overlap-off",
        "gradients are reduced on the stream of the backward pass",
        _set(f"{ZERO}.overlap_comm=false"),
        _stages(2, 3),
    ),
    Lever(
        "buckets-50m",
        "gradients are reduced in buckets of 50 million elements",
        _set(f"{ZERO}.reduce_bucket_size=50000000"),
        _stages(2, 3),
    ),
    Lever(
        "buckets-500m",
        "gradients are reduced in buckets of 500 million elements",
        _set(f"{ZERO}.reduce_bucket_size=500000000"),
        _stages(2, 3),
    ),
    Lever(
        "gather-500m",
        "weights are gathered after the step in buckets of 500 million elements",
        _set(f"{ZERO}.allgather_bucket_size=500000000"),
        _stages(1, 2),
    ),
    Lever(
        "prefetch-200m",
        "ZeRO-3 gathers up to 200 million elements ahead",
        _set(f"{ZERO}.stage3_prefetch_bucket_size=200000000"),
        _stages(3),
    ),
    Lever(
        "keep-small",
        "ZeRO-3 leaves parameters of up to a million elements whole on each rank",
        _set(f"{ZERO}.stage3_param_persistence_threshold=1000000"),
        _stages(3),
    ),
)


def find_levers(names: Iterable[str]) -> list[Lever]:
    """The levers with these names.

    Raises:
        UserError: for a name that is not in `LEVERS`; it lists those that are.
    """
    known = {lever.name: lever for lever in LEVERS}
    names = list(names)
    for name in names:
        if name not in known:
            raise UserError(f"--lever: '{name}' is not known; choose from: {', '.join(known)}")
    return [known[name] for name in names]
