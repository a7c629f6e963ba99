"""Linter rules based on what DeepSpeed does with a config.

Each rule is a function from `Facts` to findings. Every claim was checked in the source of
DeepSpeed 0.19.8 or by running it; the tests repeat the run where that is cheap.
"""

from collections.abc import Callable, Iterator

from launch.ds_json import keys as ds_keys
from launch.ds_json.finding import Finding, error, warning
from launch.ds_json.view import _DTYPE_NAMES, Facts
from launch.errors import nearest


def _precision(facts: Facts) -> Iterator[Finding]:
    config = facts.config
    if (config.get("bf16") or {}).get("enabled") is True and (config.get("fp16") or {}).get(
        "enabled"
    ) is True:
        message = "bf16 and fp16 are both enabled; DeepSpeed stops at an assertion; keep one"
        yield error("fp16.enabled", "two-precisions", message)
    if "bf16" in config and "bfloat16" in config:
        yield error("bfloat16", "two-precisions", "ignored beside bf16; keep bf16")
    autocast = (config.get("torch_autocast") or {}).get("enabled", False)
    if autocast and facts.precision in ("bf16", "fp16"):
        message = (
            f"autocast over a model whose weights are already {facts.precision} gains nothing; "
            f"enable one of torch_autocast and {facts.precision}"
        )
        yield warning("torch_autocast.enabled", "two-precisions", message)
    types = config.get("data_types", {})
    for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        value = types.get(name)
        if value is not None and value not in _DTYPE_NAMES:
            message = f"{value!r} should be one of bf16, fp16, fp32"
            yield error(f"data_types.{name}", "wrong-value", message)
    wanted = _DTYPE_NAMES.get(types.get("param_dtype"))
    if wanted and facts.precision != "auto" and wanted != facts.precision:
        message = f"{wanted} contradicts the enabled precision {facts.precision}; leave it out"
        yield error("data_types.param_dtype", "two-precisions", message)


def _stage0_precision(facts: Facts) -> Iterator[Finding]:
    if facts.stage != 0 or facts.precision not in ("bf16", "fp16"):
        return
    accumulate = _DTYPE_NAMES.get(facts.accumulate or facts.precision, facts.precision)
    if accumulate != facts.precision:
        message = (
            f"stage 0 with {facts.precision} cannot accumulate in {accumulate} and stops with "
            "'unsupported mix'; use stage 1, or torch_autocast, which keeps fp32 gradients"
        )
        yield error("data_types.grad_accum_dtype", "stage0-accumulation", message)
    if "pipeline" not in facts.config:
        message = (
            f"stage 0 with {facts.precision} accumulates and averages gradients in "
            f"{facts.precision}, and runs one optimizer step on zero gradients when it starts, so "
            'that Adam\'s bias correction is a step ahead; use "torch_autocast": {"enabled": '
            'true, "dtype": "bfloat16"}, or stage 1'
        )
        yield warning(f"{facts.precision}.enabled", "stage0-low-precision", message)


def _master_weights(facts: Facts) -> Iterator[Finding]:
    for name in ("bf16", "fp16"):
        block = facts.config.get(name) or {}
        key = f"{name}_master_weights_and_grads"
        if block.get(key) and facts.stage == 0:
            yield error(f"{name}.{key}", "forbidden", "works with ZeRO stage 1, 2 or 3 only")
        states = f"{name}_optimizer_states"
        if block.get(states) and not block.get(key):
            yield error(f"{name}.{states}", "forbidden", f"needs {name}.{key}: true as well")


def _clipping(facts: Facts) -> Iterator[Finding]:
    if "gradient_clipping" not in facts.config:
        also = "; Trainer's max_grad_norm does not reach it either" if facts.hf else ""
        blank = ', or "auto"' if facts.hf else ""
        message = f"left out, it means 1.0, not off{also}; write 1.0 or 0.0{blank}"
        yield warning("gradient_clipping", "implied-clipping", message)
    if facts.zero.get("compute_grad_norm") is False:
        key = "zero_optimization.compute_grad_norm"
        if facts.config.get("gradient_clipping", 1.0) != 0:
            yield error(key, "forbidden", "false needs gradient_clipping: 0.0")
        elif facts.bf16_optimizer:
            message = "false does not go with bf16, stage 1 and fp32 accumulation"
            yield error(key, "forbidden", message)


def _batch(facts: Facts) -> Iterator[Finding]:
    names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    total, micro, steps = (facts.config.get(name) for name in names)
    if facts.hf and "auto" in (total, micro, steps):
        return
    if total is None and micro is None:
        message = "give it or train_batch_size; DeepSpeed does not start without either"
        yield error(names[1], "batch-size", message)
        return
    if total is None:
        return
    whole = (micro or 1) * (steps or 1)
    ranks = facts.world_size
    if ranks is not None:
        whole *= ranks
        if (micro and steps and total != whole) or total % whole:
            message = (
                f"{total} is not train_micro_batch_size_per_gpu {micro or 'any'} x "
                f"gradient_accumulation_steps {steps or 'any'} x {ranks} ranks"
            )
            yield error(names[0], "batch-size", message)
    elif total % whole:
        message = f"{total} is no multiple of {whole} (micro batch x accumulation), for any ranks"
        yield error(names[0], "batch-size", message)
    elif micro and steps:
        message = (
            f"all three batch keys fix the number of ranks to {total // whole}; leave out "
            "train_batch_size to run on any number"
        )
        yield warning(names[0], "batch-size", message)


def _optimizer(facts: Facts) -> Iterator[Finding]:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if not facts.optimizer:
        return
    lower, key = facts.optimizer.lower(), "optimizer.type"
    if lower in ("onebitadam", "zerooneadam", "onebitlamb"):
        yield error(key, "removed", "1-bit optimizers have been removed; use AdamW")
    elif lower not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, facts.optimizer):
        hint = nearest(facts.optimizer, ["Adam", "AdamW", "Lamb", "Lion", "Muon", "Adagrad", "SGD"])
        yield error(key, "wrong-value", f"no optimizer {facts.optimizer!r}{hint}")
    if "max_grad_norm" in facts.params:
        message = "no optimizer parameter; DeepSpeed stops; use gradient_clipping at the top level"
        yield error("optimizer.params.max_grad_norm", "forbidden", message)
    if lower == "muon" and facts.stage == 3 and facts.zero.get("reduce_scatter", True):
        message = "Muon at ZeRO stage 3 needs false"
        yield error("zero_optimization.reduce_scatter", "forbidden", message)


def _adam(facts: Facts) -> Iterator[Finding]:
    if not facts.adam:
        return
    params, offloaded = facts.params, facts.device("offload_optimizer") != "none"
    torch_adam = bool(params.get("torch_adam", False))
    valid = ds_keys.adam_parameters(torch_adam, offloaded)
    chosen = "torch's AdamW" if torch_adam else "CPUAdam" if offloaded else "FusedAdam"
    for name in sorted(set(params) - valid - {"max_grad_norm"}):
        known = name in ds_keys.adam_parameters(torch_adam=True, offloaded=False)
        hint = "; it needs torch_adam: true" if known else nearest(name, valid)
        message = f"{chosen} takes no such parameter and stops{hint}"
        yield error(f"optimizer.params.{name}", "unknown-key", message)
    if facts.optimizer.lower() == "adam" and "adam_w_mode" not in params:
        message = 'DeepSpeed\'s "Adam" is AdamW unless adam_w_mode is false; write "AdamW"'
        yield warning("optimizer.type", "adam-is-adamw", message)
    if facts.optimizer.lower() == "adamw" and params.get("adam_w_mode") is False:
        message = 'ignored for "AdamW"; for plain Adam write "type": "Adam"'
        yield error("optimizer.params.adam_w_mode", "no-effect", message)
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in params]
    if missing:
        decay = (
            ' (weight_decay: 0.01 with torch_adam, 0 without, so that "the same" config trains '
            "differently with offload)"
            if "weight_decay" in missing
            else ""
        )
        message = f"{', '.join(missing)} left to the library's defaults{decay}; write them"
        yield warning("optimizer.params", "implied-optimizer", message)
    if torch_adam and offloaded:
        message = (
            "with offload_optimizer the step runs in torch's AdamW on the CPU instead of "
            "DeepSpeed's faster CPUAdam; leave torch_adam out"
        )
        yield warning("optimizer.params.torch_adam", "offload-torch-adam", message)


def _scheduler(facts: Facts) -> Iterator[Finding]:
    import torch
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    kind = (facts.config.get("scheduler") or {}).get("type")
    if kind is None:
        return
    if kind not in VALID_LR_SCHEDULES and not hasattr(torch.optim.lr_scheduler, str(kind)):
        hint = nearest(str(kind), VALID_LR_SCHEDULES)
        yield error("scheduler.type", "wrong-value", f"no schedule {kind!r}{hint}")


def _ranks_operation(facts: Facts) -> Iterator[Finding]:
    operation = facts.config.get("gradient_allreduce_op", "mean")
    if str(operation).lower() not in ("mean", "sum"):
        message = f"{operation!r} should be mean or sum"
        yield error("gradient_allreduce_op", "wrong-value", message)
    elif str(operation).lower() == "sum" and facts.stage == 3:
        yield error("gradient_allreduce_op", "forbidden", '"sum" does not work at stage 3')


def _hugging_face(facts: Facts) -> Iterator[Finding]:
    if not facts.hf:
        return
    if "zero_optimization" not in facts.config:
        message = "Accelerate rejects a config without it; stage 0 is enough"
        yield error("zero_optimization", "hf-missing", message)
    for name in ("betas", "eps"):
        if facts.params.get(name) == "auto":
            message = (
                "Trainer fills this in, Accelerate on its own stops at it; leave the optimizer "
                "block out, and each brings its own AdamW"
            )
            yield warning(f"optimizer.params.{name}", "hf-optimizer", message)
    owned = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
    owned += ["gradient_clipping"]
    for key in owned:
        if facts.config.get(key, "auto") != "auto":
            message = 'Trainer stops where its own argument differs; write "auto"'
            yield warning(key, "hf-literal", message)
    for name in ("lr", "betas", "eps", "weight_decay"):
        if facts.params.get(name, "auto") != "auto":
            message = "Trainer stops where its own argument differs; leave the optimizer block out"
            yield warning(f"optimizer.params.{name}", "hf-literal", message)


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _precision,
    _stage0_precision,
    _master_weights,
    _clipping,
    _batch,
    _optimizer,
    _adam,
    _scheduler,
    _ranks_operation,
    _hugging_face,
)
