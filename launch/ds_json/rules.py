"""Linter rules based on what DeepSpeed does with a config.

Each rule is a function from `Facts` to findings. Every claim was checked in the source of
DeepSpeed 0.19.8 or by running it; the tests repeat the run where that is cheap.
"""

from collections.abc import Callable, Iterator

from launch.ds_json.finding import Finding, error, shown, warning
from launch.ds_json.values import whole
from launch.ds_json.view import Facts, block, dtype_name, is_enabled, switched_on


def _precision(facts: Facts) -> Iterator[Finding]:
    config = facts.config
    if is_enabled(config, "bf16") and is_enabled(config, "fp16"):
        message = "bf16 and fp16 are both enabled; DeepSpeed stops at an assertion; keep one"
        yield error("fp16.enabled", "two-precisions", message)
    if config.get("bf16") is not None and "bfloat16" in config:
        yield error("bfloat16", "two-precisions", "ignored beside bf16; keep bf16")
    if is_enabled(config, "torch_autocast") and facts.precision in ("bf16", "fp16"):
        message = (
            f"autocast over a model whose weights are already {facts.precision} gains nothing; "
            f"enable one of torch_autocast and {facts.precision}"
        )
        yield warning("torch_autocast.enabled", "two-precisions", message)
    wanted = dtype_name(block(config, "data_types").get("param_dtype"))
    if wanted and facts.precision != "auto" and wanted != facts.precision:
        message = f"{wanted} contradicts the enabled precision {facts.precision}; leave it out"
        yield error("data_types.param_dtype", "two-precisions", message)


def _stage0_precision(facts: Facts) -> Iterator[Finding]:
    if facts.stage != 0 or facts.precision == "auto":
        return
    if facts.accumulate not in (None, facts.precision):
        message = (
            f"stage 0 with {facts.precision} cannot accumulate in {facts.accumulate} and stops with "
            "'unsupported mix'; use stage 1, or torch_autocast, which keeps fp32 gradients"
        )
        yield error("data_types.grad_accum_dtype", "stage0-accumulation", message)
    if facts.precision != "fp32" and "pipeline" not in facts.config:
        message = (
            f"stage 0 with {facts.precision} accumulates and averages gradients in "
            f"{facts.precision}, and runs one optimizer step on zero gradients when it starts, so "
            'that Adam\'s bias correction is a step ahead; use "torch_autocast": {"enabled": '
            'true, "dtype": "bfloat16"}, or stage 1'
        )
        yield warning(f"{facts.precision}.enabled", "stage0-low-precision", message)
    if facts.precision == "fp16":
        message = (
            "stage 0 divides gradients by the loss scale and never multiplies the loss by it, so that "
            "small gradients count for nothing; use stage 1"
        )
        yield warning("fp16.enabled", "stage0-fp16-scale", message)


def _muon_in_fp16(facts: Facts) -> Iterator[Finding]:
    if facts.precision == "fp16" and facts.optimizer.lower() == "muon":
        message = (
            "Muon keeps its momentum in the loss scale of the step that made it: when the scale moves, the "
            "update is wrong; use bf16"
        )
        yield warning("optimizer.type", "muon-fp16-scale", message)


def _master_weights(facts: Facts) -> Iterator[Finding]:
    for name in ("bf16", "fp16"):
        given = block(facts.config, name)
        key, states = f"{name}_master_weights_and_grads", f"{name}_optimizer_states"
        low, low_states = switched_on(given.get(key)), switched_on(given.get(states))
        if low_states and not low:
            yield error(f"{name}.{states}", "forbidden", f"needs {name}.{key}: true as well")
        if not low:
            continue
        where = f"{name}.{key}"
        if facts.stage == 0:
            yield error(where, "forbidden", "works with ZeRO stage 1, 2 or 3 only")
        elif facts.precision not in (name, "auto"):
            message = f"needs {name}.enabled: true; without it, weights are rounded to {name} all the same"
            yield error(where, "unchecked-value", message)
        elif facts.bf16_optimizer:
            message = (
                "stage 1 in bf16 with fp32 accumulation is another optimizer class (BF16_Optimizer), which "
                "keeps fp32 states; use stage 2 or 3, or data_types.grad_accum_dtype: bf16"
            )
            yield error(where, "no-effect", message)
        elif not low_states and not facts.offloaded:
            message = "with fp32 optimizer states it needs offload_optimizer"
            also = f"; or set bf16.{states}: true" if name == "bf16" else ""
            yield error(where, "forbidden", message + also)
        elif facts.offloaded and facts.params.get("torch_adam"):
            message = "with offload_optimizer it needs DeepSpeed's CPUAdam; leave torch_adam out"
            yield error(where, "forbidden", message)


def _clipping(facts: Facts) -> Iterator[Finding]:
    if "gradient_clipping" not in facts.config:
        also = "; Trainer's max_grad_norm does not reach it either" if facts.hf else ""
        blank = ', or "auto"' if facts.hf else ""
        message = f"left out, it means 1.0, not off{also}; write 1.0 or 0.0{blank}"
        yield warning("gradient_clipping", "implied-clipping", message)
    if not switched_on(facts.zero.get("compute_grad_norm", True)):
        key = "zero_optimization.compute_grad_norm"
        if facts.config.get("gradient_clipping", 1.0) not in (0, "auto"):
            yield error(key, "forbidden", "false needs gradient_clipping: 0.0")
        elif facts.bf16_optimizer:
            message = "false does not go with bf16, stage 1 and fp32 accumulation"
            yield error(key, "forbidden", message)


def _batch(facts: Facts) -> Iterator[Finding]:
    names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    given = [facts.config.get(name) for name in names]
    if any(value is not None and (whole(value) or 0) <= 0 for value in given):
        return  # "auto", or reported
    total, micro, steps = map(whole, given)
    if total is None and micro is None:
        message = "give it or train_batch_size; DeepSpeed does not start without either"
        yield error(names[1], "batch-size", message)
        return
    if total is None:
        return
    product = (micro or 1) * (steps or 1)
    ranks = facts.world_size
    if ranks is not None:
        product *= ranks
        if (micro and steps and total != product) or total % product:
            message = (
                f"{shown(total)} is not train_micro_batch_size_per_gpu {_or_any(micro)} x "
                f"gradient_accumulation_steps {_or_any(steps)} x {ranks} ranks"
            )
            yield error(names[0], "batch-size", message)
    elif total % product:
        message = (
            f"{shown(total)} is no multiple of {shown(product)} (micro batch x accumulation), for "
            "any ranks"
        )
        yield error(names[0], "batch-size", message)
    elif micro and steps:
        message = (
            f"all three batch keys fix the number of ranks to {shown(total // product)}; leave out "
            "train_batch_size to run on any number"
        )
        yield warning(names[0], "batch-size", message)


def _or_any(number: int | None) -> str:
    return "any" if number is None else shown(number)


def _ranks_operation(facts: Facts) -> Iterator[Finding]:
    operation = facts.config.get("gradient_allreduce_op")
    if isinstance(operation, str) and operation.lower() == "sum" and facts.stage == 3:
        yield error("gradient_allreduce_op", "forbidden", '"sum" does not work at stage 3')


def _own_accumulation(facts: Facts) -> Iterator[Finding]:
    if facts.config.get("managed_gradient_accumulation", True):
        return
    if switched_on(facts.zero.get("overlap_comm")) and facts.below(2):
        message = "does not go with managed_gradient_accumulation: false below stage 2"
        yield error("zero_optimization.overlap_comm", "forbidden", message)
    if switched_on(block(facts.config, "compile").get("deepcompile")):
        message = "does not go with managed_gradient_accumulation: false"
        yield error("compile.deepcompile", "forbidden", message)


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
    if "scheduler" in facts.config:
        message = (
            "Trainer's lr_scheduler_type is ignored, this schedule runs instead; Accelerate stops "
            "unless the script passes a DummyScheduler; leave the block out"
        )
        yield warning("scheduler", "hf-scheduler", message)
    schedule = block(block(facts.config, "scheduler"), "params")
    for name in ("warmup_max_lr", "warmup_num_steps", "total_num_steps"):
        if schedule.get(name, "auto") != "auto":
            message = "Trainer stops where its own number differs; leave the scheduler block out"
            yield warning(f"scheduler.params.{name}", "hf-literal", message)


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _precision,
    _stage0_precision,
    _muon_in_fp16,
    _master_weights,
    _clipping,
    _batch,
    _ranks_operation,
    _own_accumulation,
    _hugging_face,
)
