"""The planner's bytes of weights, gradients and optimizer are those of real engines, exactly."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Recipe
from launch.data.batch import Batch
from launch.memory.chunks import chunks_of_stages, running_passes
from launch.memory.moments import Step
from launch.memory.shapes import stage_shapes
from launch.memory.state import State, state
from launch.paths import ROOT
from launch.perf.memory_measure import measure
from models.pipeline_stages import stage_bounds
from tests.ranks import run_ranks
from tests.selection import representatives

# Sizes that no number of ranks divides, so that every kind of padding is there.
GPT = [
    "model.layers=2",
    "model.hidden=34",
    "model.position=learned",
    "model.heads=2",
    "model.vocab=321",
]
GPT += ["data.sequence_length=16", "train.micro_batch_size=1", "train.global_batch_size=12"]
GPT += ["train.schedule.warmup_steps=1", "train.compile=false"]
LLAMA = [*GPT, "model.norm=rmsnorm", "model.mlp=swiglu", "model.bias=false", "model.tied=false"]
LLAMA += ["model.qk_norm=true", "model.ffn=50"]
BF16, FP32 = "deepspeed.bf16.enabled=true", "deepspeed.bf16.enabled=false"
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=20000"
LOW_STATES = ["deepspeed.bf16.bf16_master_weights_and_grads=true"]
LOW_STATES += ["deepspeed.bf16.bf16_optimizer_states=true"]
ZERO3 = [BUCKET, "deepspeed.zero_optimization.stage3_param_persistence_threshold=200"]


def overrides_of(stage: str, layout: str, model: list[str]) -> list[str]:
    found = [
        *model,
        f"deepspeed.config=ds_configs/zero{stage.removesuffix('_states').removesuffix('_muon')}.json",
    ]
    if stage == "0":
        found += ["deepspeed.torch_autocast.enabled=true"]
    elif stage.startswith("0_fp32"):
        found += [FP32]
    elif "fp16" in stage:
        found += ["deepspeed.bf16=null", BUCKET]
    else:
        found += [BF16]
    if stage.startswith("2"):
        found += [BUCKET]
    if stage.startswith("3"):
        found += ZERO3
    if stage.endswith("_states"):
        found += LOW_STATES
    if stage.endswith("_muon"):
        found += ["deepspeed.optimizer.type=Muon", "deepspeed.optimizer.params.fused=null"]
    for axis in ("tensor", "pipeline"):
        if f"{axis} 2" in layout:
            found.append(f"parallel.{axis}=2")
    return found


def recipe_of(stage: str, layout: str, model: list[str]) -> Recipe:
    return load_recipe(ROOT / "recipes" / "gpt_tiny_zero1.yaml", overrides_of(stage, layout, model))


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    kept = [each for each in tensors if isinstance(each, Tensor)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()
    )


def weights(engine: Any) -> list[Any]:
    found = [p.data for p in engine.module.parameters()]
    return found + [getattr(p, "ds_tensor", None) for p in engine.module.parameters()]


def optimizer(engine: Any) -> list[Any]:
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    found = [value for each in inner.state.values() for value in each.values()]
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        found += getattr(outer, name, [])
    return found + getattr(outer, "fp32_partitioned_groups_flat", [])


def gradients(engine: Any) -> list[Any]:
    outer = engine.optimizer
    found = [p.grad for p in engine.module.parameters()]
    found += [getattr(p, "grad_accum", None) for p in engine.module.parameters()]
    found += getattr(outer, "fp32_groups_gradients_flat", [])
    for each in getattr(outer, "averaged_gradients", {}).values():
        found += [getattr(each, "flat_partition", None)]
    return [*found, getattr(outer, "grad_partitions_flat_buffer", None)]


def measured(stage: str, layout: str, model: list[str]) -> tuple[int, int, int, int, int]:
    """This rank's stage, and bytes of weights, gradients, optimizer and of buckets, before an update."""
    import torch._dynamo

    from launch.runtime.process_group import init_process_group
    from launch.training.engine import build_engine, make_topology
    from launch.training.train_step import train_step

    # The fork server has imported Muon with its kernels marked for compiling, which takes a minute.
    torch._dynamo.config.disable = True
    recipe = recipe_of(stage, layout, model)
    ranks = init_process_group()
    plan = plan_layout(recipe, ranks.world_size)
    topology = make_topology(recipe, plan)
    engine: Any = build_engine(recipe, resolve(recipe, plan), ranks, topology)
    update = engine._take_model_step
    seen = []

    def watched(*arguments: object) -> None:
        buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
        seen.append(
            (
                topology.coordinates["pipeline"],
                storages(weights(engine)),
                storages(gradients(engine)),
                storages(optimizer(engine)),
                storages(each.buffer for each in buckets if isinstance(each.buffer, Tensor)),
            )
        )
        update(*arguments)

    engine._take_model_step = watched
    shape = (plan.accumulation, plan.micro_batch, recipe.data.sequence_length)
    for _ in range(2):
        ids = torch.randint(0, 257, shape)
        tokens = float(plan.global_batch * recipe.data.sequence_length)
        train_step(engine, Batch(ids, ids, None, None, tokens))
    return seen[1]


def expected(recipe: Recipe, ranks: int) -> list[State]:
    """The planner's state of each stage."""
    assert isinstance(recipe.model, GPTModel)
    config, plan = recipe.model.shape, plan_layout(recipe, ranks)
    bounds = [0, config.layers + 4]
    if plan.grid["pipeline"] > 1:
        bounds = stage_bounds(config, plan.grid["pipeline"], recipe.parallel.partition)
    return [
        state(
            stage_shapes(config, plan.grid["tensor"], first, last),
            resolve(recipe, plan),
            plan.grid["data"],
            plan.accumulation,
        )
        for first, last in pairwise(bounds)
    ]


LAYOUTS = {"one rank": 1, "data 2": 2, "data 3": 3, "tensor 2": 2, "tensor 2, data 2": 4}
DATA = {layout: ranks for layout, ranks in LAYOUTS.items() if "tensor" not in layout}
PIPELINES = {"pipeline 2": 2, "pipeline 2, data 2": 4, "pipeline 2, tensor 2": 4}
MODELS = {"gpt": GPT, "llama": LLAMA}
CASES = [
    pytest.param(stage, layout, model)
    for stages, layouts in (
        (("0", "0_fp32", "1", "2", "3", "2_states", "3_states"), LAYOUTS),
        (("0_fp32", "1"), PIPELINES),
        (("0_fp32_muon", "1_muon"), DATA),
    )
    for stage in stages
    for layout in layouts
    for model in MODELS
    if "muon" not in stage or model == "gpt"  # the other model's embeddings are not tied
]


@pytest.mark.parametrize(
    ("stage", "layout", "model"),
    representatives(
        CASES,
        lambda stage, layout, model: {
            (layout.partition(" ")[0], model),
            layout if layout == "one rank" else stage,
        },
        lambda _, layout, __: len(layout),
    ),
)
def test_state_is_exact_to_the_byte(stage: str, layout: str, model: str) -> None:
    world_size = {**LAYOUTS, **PIPELINES}[layout]
    said = expected(recipe_of(stage, layout, MODELS[model]), world_size)
    for rank in run_ranks(measured, world_size, stage, layout, MODELS[model]):
        here = said[rank[0]]
        assert rank[1:] == (here.weights, here.gradients, here.optimizer, here.buckets)


@pytest.mark.parametrize(
    ("accumulation", "contiguous"),
    [
        (3, "true"),
        pytest.param(1, "true", marks=pytest.mark.matrix),
        pytest.param(1, "false", marks=pytest.mark.matrix),
    ],
)
def test_sums_in_16_bits_stand_beside_a_micro_batchs_gradients(
    accumulation: int, contiguous: str
) -> None:
    """The peak of a backward pass, as the optimizer's step on a CPU is not a GPU's."""
    recipe = load_recipe(
        ROOT / "recipes" / "gpt_tiny_zero1.yaml",
        [
            "deepspeed.config=ds_configs/zero2_bf16_states.json",
            BF16,
            "deepspeed.optimizer.params.fused=null",
            "deepspeed.data_types.grad_accum_dtype=bf16",
            f"deepspeed.zero_optimization.contiguous_gradients={contiguous}",
            "deepspeed.zero_optimization.reduce_bucket_size=200000",
            *("model.checkpoint_activations=true", "model.layers=8", "model.hidden=256"),
            *("data.sequence_length=64", "train.micro_batch_size=2"),
            f"train.global_batch_size={2 * accumulation}",
        ],
    )
    layout = plan_layout(recipe, 1)
    assert isinstance(recipe.model, GPTModel)
    (chunks,) = chunks_of_stages(recipe.model.shape, 1, recipe.parallel)
    (running,) = running_passes(recipe, layout, 0)
    step = Step.of(recipe, layout, resolve(recipe, layout), 0, chunks, running)
    predicted = [p.total - p.overhead for name, p in step.moments().items() if name != "the update"]
    (rank,) = measure(recipe, 1, 2)
    assert max(predicted) == pytest.approx(rank.phases["backward"], rel=0.015)
