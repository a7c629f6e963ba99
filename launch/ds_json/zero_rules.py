"""Linter rules for keys that have no effect, at the given ZeRO stage or at all.

DeepSpeed accepts every key of `zero_optimization` at every stage and silently ignores those that
the stage does not use. The sets below follow `DeepSpeedEngine._configure_zero_optimizer`.
"""

from collections.abc import Iterator

from launch.ds_json import keys as ds_keys
from launch.ds_json.finding import Finding, error, warning
from launch.ds_json.view import Facts, block, switched_on

_STAGE_3_ONLY = {
    "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "override_module_apply", "pipeline_loading_checkpoint", "log_trace_cache_warnings",
    "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
}  # fmt: skip
_STAGES_1_AND_2_ONLY = {
    "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "round_robin_gradients",
    "parameter_alignment", "ignore_unused_parameters", "elastic_checkpoint",
}  # fmt: skip
# Passed to BF16_Optimizer: see DeepSpeedEngine._configure_bf16_optimizer.
_BF16_OPTIMIZER_KEYS = {"stage", "allgather_bucket_size", "compute_grad_norm", "offload_optimizer"}
_BF16_OPTIMIZER_KEYS |= {"load_from_fp32_weights"}


def without_effect(facts: Facts) -> Iterator[Finding]:
    """Keys of `zero_optimization` that this stage does not read."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    aliases = {f.alias: name for name, f in DeepSpeedZeroConfig.model_fields.items() if f.alias}
    known = ds_keys.tree()["zero_optimization"]
    stage_3 = _STAGE_3_ONLY | set(aliases) | set(aliases.values())
    for key in facts.zero:
        where = f"zero_optimization.{key}"
        if key not in known or key in ("stage", "offload_optimizer", "offload_param"):
            continue
        if key == "allgather_partitions":
            message = "read by no stage; leave it out"
        elif facts.stage == 0:
            message = "has no effect at stage 0"
        elif facts.below(3) and key in stage_3:
            message = f"has no effect at stage {facts.stage}, only at stage 3"
        elif facts.stage == 3 and key in _STAGES_1_AND_2_ONLY:
            message = "has no effect at stage 3, only at stages 1 and 2"
        elif facts.bf16_optimizer and key not in _BF16_OPTIMIZER_KEYS:
            message = (
                "has no effect at stage 1 in bf16 with fp32 accumulation, which is another "
                "optimizer class (BF16_Optimizer) with its own buckets"
            )
        else:
            continue
        yield warning(where, "no-effect", message)


def deprecated(facts: Facts) -> Iterator[Finding]:
    """Deprecated names, in any block, that still work."""
    for path, model in ds_keys.models().items():
        given = block(facts.config, path)
        for name, new in ds_keys.renamed(model).items():
            if name in given:
                yield warning(f"{path}.{name}", "deprecated", f"old name; use {new}")


def offload(facts: Facts) -> Iterator[Finding]:
    """Offload blocks that have no effect or use a different device than configured."""
    parameters, optimizer = "zero_optimization.offload_param", "zero_optimization.offload_optimizer"
    if facts.device("offload_param") != "none" and facts.below(3):
        message = f"ignored at stage {facts.stage}: parameters are offloaded at stage 3 only"
        yield error(parameters, "no-effect", message)
    device = facts.device("offload_optimizer")
    if device != "none" and facts.stage == 0:
        message = (
            "nothing is offloaded at stage 0, yet Adam becomes the CPU's, which a GPU's "
            "parameters cannot use; use stage 1, 2 or 3"
        )
        yield error(optimizer, "no-effect", message)
    if device == "nvme" and facts.stage in (1, 2):
        message = f"stage {facts.stage} keeps the states in CPU memory, not on NVMe; use stage 3"
        yield error(f"{optimizer}.device", "nvme-becomes-cpu", message)
    if switched_on(block(facts.zero, "offload_optimizer").get("super_offload")) and facts.below(3):
        yield error(f"{optimizer}.super_offload", "no-effect", "works at stage 3 only")
    for path, name in ((parameters, "offload_param"), (optimizer, "offload_optimizer")):
        if facts.device(name) == "nvme" and not facts.zero[name].get("nvme_path"):
            yield error(f"{path}.nvme_path", "forbidden", "device nvme needs a folder here")
    uses_nvme = "nvme" in (facts.device("offload_param"), device) and facts.stage == 3
    if "aio" in facts.config and facts.stage is not None and not uses_nvme:
        yield warning("aio", "no-effect", "read for NVMe offload at stage 3 only")


def other_blocks(facts: Facts) -> Iterator[Finding]:
    """Blocks outside `zero_optimization` that do less than they seem to do."""
    if "activation_checkpointing" in facts.config:
        message = (
            "checkpoints nothing by itself: the model must call "
            "deepspeed.checkpointing.checkpoint, after deepspeed.checkpointing.configure"
        )
        yield warning("activation_checkpointing", "no-effect", message)
    if "pipeline" in facts.config and facts.stage in (2, 3):
        message = "PipelineModule rejects ZeRO stages 2 and 3, and nothing else reads this block"
        yield warning("pipeline", "no-effect", message)


STAGE_RULES = (without_effect, deprecated, offload, other_blocks)
