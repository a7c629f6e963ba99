"""The valid keys of a DeepSpeed JSON at every depth, and how DeepSpeed reads their values.

Most blocks are pydantic models in DeepSpeed, and the tree below is built from the installed ones.
DeepSpeed reads the remaining blocks key by key; they are listed here, and a test compares the
lists with the keys that DeepSpeed 0.19.8 actually reads.
"""

import inspect
from functools import lru_cache
from typing import Any, get_args

Tree = dict[str, Any]
"""Key -> the tree of the block below it, or None if anything may follow."""

# Top-level values that are not blocks, and their expected kinds, which `values.py` defines.
SCALARS: dict[str, str] = {
    "train_batch_size": "positive whole number or null",
    "train_micro_batch_size_per_gpu": "positive whole number or null",
    "gradient_accumulation_steps": "positive whole number or null",
    "managed_gradient_accumulation": "boolean",
    "steps_per_print": "positive number or null",
    "gradient_clipping": "number from 0",
    "prescale_gradients": "boolean",
    "gradient_predivide_factor": "positive number",
    "gradient_allreduce_op": "one of mean, sum",
    "communication_data_type": "one of fp32, fp16, bf16 or null",
    "seq_parallel_communication_data_type": "one of fp32, fp16, bf16 or null",
    "zero_allow_untested_optimizer": "boolean",
    "zero_force_ds_cpu_optimizer": "boolean",
    "disable_allgather": "boolean",
    "dump_state": "boolean",
    "disable_python_gc": "boolean",
    "wall_clock_breakdown": "boolean",
    "memory_breakdown": "boolean",
    "dataloader_drop_last": "boolean",
    "use_data_before_expert_parallelism": "boolean",
    "vocabulary_size": "positive whole number or null",
    "log_level": "one of debug, info, warning, error, critical or null",
    "sequence_parallel_size": "positive integer",
    "data_parallel_size": "positive integer",
}

# Kinds of values in blocks that no pydantic model checks. What is not listed may be anything.
_IN_BLOCKS = {
    "boolean": "activation_checkpointing.partition_activations "
    "activation_checkpointing.contiguous_memory_optimization "
    "activation_checkpointing.synchronize_checkpoint_boundary "
    "activation_checkpointing.cpu_checkpointing activation_checkpointing.profile "
    "aio.single_submit aio.overlap_events aio.use_gds "
    "autotuning.enabled autotuning.fast autotuning.overwrite "
    "checkpoint.load_universal checkpoint.use_node_local_storage "
    "checkpoint.checkpoint_serialization checkpoint.parallel_write.pipeline_stage "
    "checkpoint.writer.io_buffer_double checkpoint.writer.show_statistics "
    "checkpoint.writer.decoupled data_efficiency.enabled "
    "flops_profiler.enabled flops_profiler.detailed optimizer.legacy_fusion "
    "pipeline.seed_layers pipeline.pipe_partitioned pipeline.grad_partitioned "
    "pipeline.use_reentrant torch_autocast.enabled",
    "positive integer": "aio.block_size aio.queue_depth aio.intra_op_parallelism "
    "checkpoint.writer.io_buffer_size flops_profiler.profile_step flops_profiler.top_modules",
    "positive integer or null": "activation_checkpointing.number_checkpoints",
    "number from 0": "flops_profiler.recompute_fwd_factor",
    "text": "autotuning.results_dir autotuning.exps_dir pipeline.partition",
    "text or null": "flops_profiler.output_file optimizer.type scheduler.type",
    "one of Warn, Ignore, Fail": "checkpoint.tag_validation",
    "one of fast, python, mock or null": "checkpoint.writer.type",
    "one of replica, socket, machine or null": "checkpoint.writer.data_parallel",
    "16-bit dtype (bf16 or fp16)": "torch_autocast.dtype",
    "dtype (bf16, fp16 or fp32) or null": "data_types.grad_accum_dtype data_types.param_dtype "
    "data_types.buffer_dtype",
    "object {...} or null": "optimizer.params",
    "list of names": "torch_autocast.lower_precision_safe_modules data_types.keep_in_fp32_modules",
}
KINDS = {**SCALARS, **{key: kind for kind, keys in _IN_BLOCKS.items() for key in keys.split()}}


def _keys(text: str) -> Tree:
    return dict.fromkeys(text.split())


# Blocks that DeepSpeed reads key by key: it silently ignores misspelt keys in them.
PLAIN_BLOCKS: Tree = {
    "activation_checkpointing": _keys(
        "partition_activations number_checkpoints contiguous_memory_optimization "
        "synchronize_checkpoint_boundary cpu_checkpointing profile"
    ),
    "aio": _keys(
        "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"
    ),
    "autotuning": {
        **_keys(
            "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step "
            "metric metric_path tuner_type tuner_early_stopping tuner_num_trials "
            "model_info_path mp_size max_train_batch_size min_train_batch_size "
            "max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
            "num_tuning_micro_batch_sizes"
        ),
        "arg_mappings": None,
        "model_info": _keys("profile num_params hidden_size num_layers"),
    },
    "checkpoint": {
        **_keys("tag_validation checkpoint_serialization load_universal use_node_local_storage"),
        "parallel_write": _keys("pipeline_stage"),
        "writer": _keys(
            "type io_buffer_size io_buffer_double show_statistics data_parallel decoupled "
            "io_multiplier"
        ),
    },
    "data_efficiency": {"enabled": None, "seed": None, "data_sampling": None, "data_routing": None},
    "data_types": _keys("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "datastates_ckpt": None,
    "flops_profiler": _keys(
        "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"
    ),
    "optimizer": {"type": None, "params": None, "legacy_fusion": None},
    "pipeline": _keys(
        "stages partition seed_layers activation_checkpoint_interval pipe_partitioned "
        "grad_partitioned use_reentrant"
    ),
    "scheduler": {"type": None, "params": None},
    "torch_autocast": _keys("enabled dtype lower_precision_safe_modules"),
}


@lru_cache(maxsize=1)
def models() -> dict[str, Any]:
    """Dotted path of a block -> the pydantic model with which DeepSpeed parses it."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,  # old name, still accepted
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "weight_quantization": WeightQuantConfig,
    }


@lru_cache(maxsize=1)
def tree() -> Tree:
    """Every key that DeepSpeed reads, as a tree of blocks."""
    found: Tree = {**dict.fromkeys(SCALARS), **PLAIN_BLOCKS, "timers": {}}
    found["expert_parallel"] = _expert_parallel_keys()
    for path, model in models().items():
        block = found
        *parents, name = path.split(".")
        for parent in parents:
            block = block[parent]
        block[name] = _model_tree(model)
    return found


def _model_tree(model: Any) -> Tree:
    keys: Tree = {}
    for name, field in model.model_fields.items():
        nested = _nested_model(field.annotation)
        below = _model_tree(nested) if nested else None
        # DeepSpeed accepts the field's own name as well as its alias (populate_by_name).
        keys[name] = below
        if field.alias:
            keys[field.alias] = below
    return keys


def _nested_model(annotation: Any) -> Any:
    from pydantic import BaseModel

    for candidate in (annotation, *get_args(annotation)):
        if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _expert_parallel_keys() -> Tree:
    import dataclasses

    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    names = [field.name for field in dataclasses.fields(AutoEPConfig)]
    return dict.fromkeys(name for name in names if not name.startswith("_"))


def renamed(model: Any) -> dict[str, str]:
    """Deprecated key -> its replacement, according to the model."""
    found = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            found[name] = str(extra.get("new_param", "nothing"))
    return found


@lru_cache(maxsize=1)
def removed() -> dict[str, str]:
    """Dotted key of a removed feature -> DeepSpeed's own message."""
    from deepspeed.runtime import config

    top: dict[str, str] = config._REMOVED_TOP_LEVEL_CONFIG_KEYS
    zero: dict[str, str] = config._REMOVED_ZERO_CONFIG_KEYS
    return {**top, **{f"zero_optimization.{key}": text for key, text in zero.items()}}
