"""What does not compose is rejected in words, with the nearest layout that does."""

import re

import pytest

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.errors import UserError
from launch.paths import ROOT

TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
SEQUENCE = "parallel.sequence=true"
CHUNKS = "model.loss_chunks=4"
COPIES = "parallel.copy_engine=true"
GRAPHS = "train.cuda_graphs=true"
INTERLEAVED = ("parallel.schedule=interleaved", "parallel.model_chunks=2")


def read(stem: str, *overrides: str, ranks: int = 4) -> dict[str, object]:
    """As `launch/train.py` reads a recipe, before any model is built."""
    name = stem if stem.startswith("hf") else f"gpt_tiny_{stem}"
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    return resolve(recipe, plan_layout(recipe, ranks))


MUON = "deepspeed.optimizer={type: Muon, params: {lr: 0.02, fused: null}}"
REJECTED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pipeline with ZeRO-2": (
        "zero2", (PIPELINE,), r"parallel.pipeline: .* stage 2: .* use deepspeed.config=ds_configs/zero1",
    ),
    "pipeline with ZeRO-3": ("zero3", (PIPELINE, TENSOR), r"parallel.pipeline: .* stage 3"),
    "pipeline in bf16 at stage 0": (
        "zero0", (PIPELINE, "deepspeed.bf16.enabled=true", "deepspeed.data_types=null"),
        r"bf16.enabled: a pipeline at ZeRO stage 0 .* use deepspeed.config=ds_configs/zero1.json",
    ),
    "fp16 at stage 0": (
        "zero0", ("deepspeed.fp16.enabled=true", "deepspeed.data_types=null"),
        r"fp16.enabled: .* divides gradients by the loss scale.* use .*=ds_configs/zero1_fp16.json",
    ),
    "master weights in fp16": (
        "zero2_offload_cpu",
        (
            "deepspeed.bf16=null", "deepspeed.data_types=null", "deepspeed.fp16.enabled=true",
            "deepspeed.fp16.fp16_master_weights_and_grads=true",
        ),
        r"fp16.fp16_master_weights_and_grads: nothing checks .* use bf16",
    ),
    "copies of four ranks": (
        "zero1", ("parallel.tensor=4", COPIES), r"parallel.copy_engine: .* 2 ranks, and .* is 4; use",
    ),
    "copies of one rank": ("zero1", (COPIES,), r"parallel.copy_engine: .* parallel.tensor is 1; use"),
    "copies with sequence parallelism": (
        "zero1", (TENSOR, SEQUENCE, COPIES), r"parallel.copy_engine: .* use parallel.sequence=false, or",
    ),
    "copies of transformers": (
        "hf_qwen3_0b6_zero2", (TENSOR, COPIES), r"parallel.copy_engine: it is of our own layers",
    ),
    "Muon in fp16": (
        "zero1",
        (
            "deepspeed.config=ds_configs/zero1_fp16.json",
            "deepspeed.optimizer={type: Muon, params: {lr: 0.02}}",
        ),
        r"optimizer.type: DeepSpeed's Muon keeps its momentum in the loss scale .* use bf16",
    ),
    "Muon on tensor ranks": (
        "zero1", (MUON, "deepspeed.bf16.enabled=true", TENSOR), r"optimizer.type: Muon makes whole",
    ),
    "Muon with an untied head": (
        "zero0", (MUON, "model.tied=false"), r"optimizer.type: .* use family gpt with model.tied=true",
    ),
    "Muon of transformers": ("hf_qwen3_0b6_zero2", (MUON,), r"optimizer.type: DeepSpeed gives Muon"),
    **{
        f"Muon with {stem}": (
            stem, (MUON, "deepspeed.zero_optimization.reduce_scatter=false"),
            r"optimizer.type: here DeepSpeed clips .*=ds_configs/zero1.json in bf16, or zero0.json",
        )
        for stem in ("zero1", "zero2", "zero3")
    },
    "a tied last stage without a block": (
        "zero1", (PIPELINE, TENSOR, "parallel.partition=type:token|norm", "deepspeed.bf16.enabled=true"),
        r"parallel.partition: the last stage has no block, .* model.tied=false, or fewer stages",
    ),
    "a last stage with nothing but tied weights": (
        "zero1", (PIPELINE, "parallel.partition=flops", "model.vocab=9000", "deepspeed.bf16.enabled=true"),
        r"parallel.partition: the last stage has no block, .* model.tied=false, or fewer stages",
    ),
    "no such partition": (
        "zero1", (PIPELINE, "parallel.partition=best"), r"parallel.partition: 'best' is not parameters",
    ),
    "a partition that matches nothing": (
        "zero1", (PIPELINE, "parallel.partition='type:mlp'"), r"parallel.partition: 0 layers match 'mlp'",
    ),
    "one kind of cut messages": (
        "zero1", (PIPELINE, TENSOR, "deepspeed.pipeline.pipe_partitioned=false"),
        r"pipeline: with pipe_partitioned and grad_partitioned unequal, DeepSpeed stops or hangs",
    ),
    "messages cut twice": (
        "zero1", (PIPELINE, TENSOR, SEQUENCE, "deepspeed.pipeline.pipe_partitioned=true"),
        r"pipeline.pipe_partitioned: with parallel.sequence, .* sharded over the tensor ranks already",
    ),
    "DeepSpeed's own recomputation": (
        "zero1", (PIPELINE, "deepspeed.pipeline.activation_checkpoint_interval=1"),
        r"pipeline.activation_checkpoint_interval: use model.checkpoint_activations",
    ),
    "a stage in quotes": (
        "zero1", (PIPELINE, "deepspeed.zero_optimization.stage='3'"), r"parallel.pipeline: .* stage 3",
    ),
    "a stage that is null": ("zero1", ("deepspeed.zero_optimization.stage=[3]",), r"stage"),
    "AutoTP beside our own": (
        "zero1", (TENSOR, "deepspeed.tensor_parallel.autotp_size=2"), r"tensor_parallel: .* take the",
    ),
    "hpZ over tensor ranks": (
        "zero3", (TENSOR, "deepspeed.zero_optimization.zero_hpz_partition_size=2"),
        r"zero_hpz_partition_size: it makes groups of neighbouring ranks",
    ),
    "compiled ZeRO-3 with DeepSpeed's own linear layer": (
        "zero3",
        ("train.compile=true", "deepspeed.zero_optimization.memory_efficient_linear=true"),
        r"memory_efficient_linear: .* set it to false, or use train.compile=false",
    ),
    "compiled ZeRO-3 of a transformers model": (
        "hf_qwen3_0b6_zero2",
        ("train.compile=true", "deepspeed.config=ds_configs/zero3.json"),
        r"train.compile: .* use train.compile=false, or deepspeed.config=ds_configs/zero2.json",
    ),
    "compiled dropout over tensor ranks": (
        "zero1", (TENSOR, "train.compile=true", "model.dropout=0.1"),
        r"train.compile: .* use model.dropout=0.0, or train.compile=false",
    ),
    "compiled sums of norms' gradients": (
        "zero1", (TENSOR, SEQUENCE, "train.compile=true"),
        r"train.compile: .* do not depend on each other, .* use parallel.sequence=false, or",
    ),
    "compiled sums of the gradients of norms of keys": (
        "zero1", (TENSOR, "model.qk_norm=true", "train.compile=true"),
        r"train.compile: .* do not depend on each other, .* use model.qk_norm=false, or",
    ),
    "compiled gathers of a shared head": (
        "zero1", ("parallel.tensor=4", "model.kv_heads=2", "train.compile=true"),
        r"train.compile: .* do not depend on each other, .* use parallel.tensor=2, or",
    ),
    "compiled AutoTP": (
        "hf_qwen3_0b6_zero2", (TENSOR, "train.compile=true"),
        r"train.compile: .* use train.compile=false, or parallel.tensor=1",
    ),
    "compiled zero-bubble": (
        "zero1", (PIPELINE, "parallel.schedule=zb-h1", "train.compile=true"),
        r"train.compile: .* zb-h1 puts .* use parallel.schedule=1f1b, or train.compile=false",
    ),
    "chunks without their schedule": (
        "zero1", (PIPELINE, "parallel.model_chunks=2"),
        r"parallel.model_chunks: .* this is 2 with 1f1b; use parallel.schedule=interleaved parallel.model",
    ),
    "a schedule of chunks without chunks": (
        "zero1", (PIPELINE, "parallel.schedule=interleaved"),
        r"parallel.model_chunks: .* this is 1 with interleaved; use .*, or take both out",
    ),
    "chunks of one stage": (
        "zero1", ("parallel.model_chunks=2",), r"parallel.model_chunks: it orders a pipeline, and paral",
    ),
    "more chunks than blocks": (
        "zero1", (PIPELINE, *INTERLEAVED, "parallel.model_chunks=3"),
        r"parallel.model_chunks: 2 stages of 3 chunks are 6 parts, more than the model's 4 layers; use",
    ),
    "micro batches that are no groups": (
        "zero1", (PIPELINE, *INTERLEAVED, "train.global_batch_size=10", "train.micro_batch_size=2"),
        r"parallel.schedule: interleaved .* groups of 2, one a stage, and a step has 5; use train.global_ba"
        r"tch_size=12, or parallel.schedule=1f1b parallel.model_chunks=1",
    ),
    "parts of what stages send, and chunks": (
        "zero1",
        (PIPELINE, TENSOR, *INTERLEAVED, "deepspeed.pipeline.pipe_partitioned=true",
         "deepspeed.pipeline.grad_partitioned=true"),
        r"pipeline.pipe_partitioned: the engine sends no .* several model chunks; take the key out",
    ),
    "heads": ("zero1", ("parallel.tensor=3",), r"parallel.tensor: 3 ranks do not .* use 2 or 4"),
    "too many key/value heads": (
        "zero1", ("parallel.tensor=4", "model.heads=12", "model.hidden=384", "model.kv_heads=3"),
        r"parallel.tensor: 4 ranks do not divide the model's 12 heads, 3 key/value heads .* use 3 or 6",
    ),
    **{
        key: ("zero3", (f"deepspeed.{key}={value}",), rf"{key}.*: {reason}; take the key out")
        for key, value, reason in (
            ("zero_optimization.zero_quantized_weights", "true", ".* 8 bits, and nothing checks it"),
            ("zero_optimization.zero_quantized_gradients", "true", ".* 4 bits, and nothing checks it"),
            ("zero_optimization.zenflow", "{topk_ratio: 0.1}", "it transposes .* every micro batch"),
            (
                "zero_optimization.offload_optimizer", "{device: cpu, super_offload: true}",
                "it was slower than offload without it",
            ),
            ("compile.deepcompile", "true", "with torch 2.11, models did not get through .*"),
        )
    },
    "a loss in chunks at a stage's end": (
        "zero1", (PIPELINE, CHUNKS), r"model.loss_chunks: .* use parallel.pipeline=1, or model",
    ),
    "a loss in chunks of a cut sequence": (
        "zero1", (TENSOR, SEQUENCE, CHUNKS), r"model.loss_chunks: .* use parallel.sequence=false, or model",
    ),
    "an MLP in chunks at a stage's end": (
        "zero1", (PIPELINE, "model.mlp_chunks=2"), r"model.mlp_chunks: .* use parallel.pipeline=1, or",
    ),
    "compiled collectives of an MLP's chunks": (
        "zero1", (TENSOR, "model.mlp_chunks=2", "train.compile=true"),
        r"train.compile: .* do not depend on each other, .* use model.mlp_chunks=1, or train.compile=false",
    ),
    "checkpoints on the CPU without checkpoints": (
        "zero1", ("model.cpu_checkpointing=true",),
        r"model.cpu_checkpointing: .* model.checkpoint_activations is false; set that to true",
    ),
    "graphs of code that is not compiled": (
        "zero1", (GRAPHS,), r"train.cuda_graphs: .* train.compile is false; set that to true",
    ),
    "graphs of blocks whose weights move": (
        "zero3", (GRAPHS, "train.compile=true"), r"train.cuda_graphs: .* each block by itself; .*zero1",
    ),
    "graphs of blocks whose inputs move": (
        "zero1",
        (GRAPHS, "train.compile=true", "model.checkpoint_activations=true", "model.cpu_checkpointing=true"),
        r"train.cuda_graphs: .*zero1.json without parallel.pipeline and model.cpu_checkpointing",
    ),
    "graphs of a pipeline": (
        "zero1", (GRAPHS, "train.compile=true", PIPELINE), r"train.cuda_graphs: .* without parallel.pipe",
    ),
    "graphs of a transformers model": (
        "hf_qwen3_0b6_zero2", (GRAPHS, "train.compile=true"), r"train.cuda_graphs: nothing .* take the key",
    ),
    "compiled collectives of chunks": (
        "zero1", (TENSOR, CHUNKS, "train.compile=true"),
        r"train.compile: .* not depend on each other, .* use model.loss_chunks=1, or train.compile=false",
    ),
    "modules gathered whole for their size": (
        "zero3", ("deepspeed.zero_optimization.stage3_module_granularity_threshold=1e9",),
        r"stage3_module_granularity_threshold: .* take the key out, or name .* leaf_module",
    ),
    "sequence length": (
        "zero1", (TENSOR, SEQUENCE, "data.sequence_length=255"), r"parallel.sequence: .* use 254",
    ),
    "hf in stages": ("hf_qwen3_0b6_zero2", (PIPELINE,), r"parallel.pipeline: .* use parallel.tensor, or a"),
    "hf along the sequence": (
        "hf_qwen3_0b6_zero2", (TENSOR, SEQUENCE), r"parallel.sequence: DeepSpeed's AutoTP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_it_is_rejected_in_one_line(case: str) -> None:
    stem, overrides, message = REJECTED[case]
    with pytest.raises(UserError) as caught:
        read(stem, *overrides)
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("layout", [(), (TENSOR,), (PIPELINE,), (TENSOR, PIPELINE, SEQUENCE)])
@pytest.mark.parametrize(
    "block", ["zero_optimization=auto", "zero_optimization.stage=auto", "bf16=-1", "pipeline=0.5"]
)
def test_a_block_of_the_wrong_type_is_one_line(layout: tuple[str, ...], block: str) -> None:
    with pytest.raises(UserError, match=rf"deepspeed\.{block.partition('=')[0]}: ") as caught:
        read("zero1", *layout, f"deepspeed.{block}")
    assert "\n" not in str(caught.value)


def test_what_composes_is_accepted() -> None:
    for stem, overrides in (
        ("zero0", (PIPELINE,)), ("zero1", (PIPELINE, TENSOR)), ("zero3", (TENSOR, SEQUENCE)),
        ("zero2_offload_cpu", (TENSOR,)), ("zero1", ("parallel.tensor=4", "model.kv_heads=2")),
        ("zero3", (TENSOR, "train.compile=true", "model.dropout=0.0")),
        ("zero0", (MUON,)), ("zero1", (MUON, "deepspeed.bf16.enabled=true")),
    ):  # fmt: skip
        read(stem, *overrides)


def test_with_sequence_parallelism_stages_send_what_they_have() -> None:
    config = read("zero1", PIPELINE, TENSOR, SEQUENCE)
    assert config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
