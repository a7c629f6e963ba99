"""A linter for DeepSpeed JSON: finds settings that DeepSpeed 0.19.8 rejects, ignores or misreads.

`lint` works on any config, ours or not. This file walks the keys; `values.py` checks single values,
the rules about several are in the modules called `rules` or `*_rules`, and the table of keys is in
`keys.py`.
"""

from collections.abc import Iterator
from typing import Any

from launch.ds_json import keys as ds_keys
from launch.ds_json.finding import Finding, error, warning
from launch.ds_json.optimizer_rules import OPTIMIZER_RULES
from launch.ds_json.rules import RULES
from launch.ds_json.schedule_rules import SCHEDULE_RULES
from launch.ds_json.values import ask_deepspeed, check_values
from launch.ds_json.view import Facts
from launch.ds_json.zero_rules import STAGE_RULES
from launch.errors import nearest

__all__ = ["Finding", "lint"]

# Here "auto" is DeepSpeed's own value, not a placeholder for Hugging Face.
_OWN_AUTO = (
    "data_types.keep_in_fp32_modules",
    "expert_parallel",
    "pipeline.stages",
    "zero_optimization.zenflow",
)

# Filled in by transformers' Trainer or Accelerate; any other "auto" reaches DeepSpeed unchanged.
HF_FILLS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "fp16.enabled", "bf16.enabled",
    "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr", "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps",
    "zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}  # fmt: skip
# Filled in by Accelerate's plugin, which Trainer uses too, from its own settings or defaults.
_PLUGIN_FILLS = {
    "zero_optimization.stage": "2",
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_optimizer.nvme_path": "none",
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.offload_param.nvme_path": "none",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "false",
}
# JSON has no comments; what begins like this is one, where DeepSpeed ignores what it does not know.
_COMMENT = ("_", "//")
# Far above any config, and far below what Python's stack can hold.
_DEEPEST = 50


def lint(config: Any, *, hf: bool = False, world_size: int | None = None) -> list[Finding]:
    """Lint a DeepSpeed config; errors come first. Never raises, whatever the JSON holds.

    Args:
        config: the parsed JSON.
        hf: the config is for transformers' Trainer or Accelerate, which fill in "auto".
        world_size: number of data parallel ranks, if known, to check the batch sizes.
    """
    if not isinstance(config, dict):
        return [error("", "not-an-object", "a DeepSpeed config is a JSON object {...}")]
    if _deeper_than(config, _DEEPEST):
        return [error("", "too-deep", f"nested more than {_DEEPEST} deep, which no config is")]
    values = list(check_values(config))
    wrong = {finding.key for finding in values}
    facts = Facts.read(config, hf=hf, world_size=world_size, wrong=wrong)
    rules = (*RULES, *STAGE_RULES, *OPTIMIZER_RULES, *SCHEDULE_RULES)
    found = [finding for rule in rules for finding in rule(facts)]
    findings = [
        *_walk_unknown(config, ds_keys.tree(), ""),
        *_autos(config, hf),
        *values,
        # What is wrong in itself is reported once.
        *(finding for finding in found if not _lies_in(finding.key, wrong)),
    ]
    reported = {f.key.split(".")[0] for f in findings if f.level == "error"}
    findings += ask_deepspeed(config, reported)
    return sorted(findings, key=lambda finding: (finding.level != "error", finding.key))


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            below
            for each in layer
            if isinstance(each, dict | list)
            for below in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in layer)


def _lies_in(key: str, wrong: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: end + 1]) in wrong for end in range(len(parts)))


def leaves(block: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything below `block` that is not an object."""
    if isinstance(block, dict):
        for key, value in block.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, block


def _walk_unknown(block: dict[str, Any], valid: ds_keys.Tree, path: str) -> Iterator[Finding]:
    for key, value in block.items():
        here = f"{path}.{key}" if path else key
        if here in ds_keys.removed():
            words = " ".join(ds_keys.removed()[here].split())
            yield error(here, "removed", words)
        elif key not in valid:
            if key.startswith(_COMMENT) and not _is_strict(path):
                continue
            yield _unknown(key, here, valid, path)
        elif isinstance(value, dict) and valid[key] is not None:
            yield from _walk_unknown(value, valid[key], here)


def _unknown(key: str, here: str, valid: ds_keys.Tree, path: str) -> Finding:
    fate = "DeepSpeed rejects it" if _is_strict(path) else "DeepSpeed ignores it without a word"
    hint = nearest(key, valid)
    if not hint:
        homes = [parent for parent, name in _all_keys() if name == key and parent != path]
        if homes:
            home = homes[0] or "the top level"
            hint = f"; it belongs in {home}"
    return error(here, "unknown-key", f"unknown key; {fate}{hint}")


def _is_strict(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in ds_keys.models())


def _all_keys() -> Iterator[tuple[str, str]]:
    def walk(block: ds_keys.Tree, path: str) -> Iterator[tuple[str, str]]:
        for key, below in block.items():
            yield path, key
            if below:
                yield from walk(below, f"{path}.{key}" if path else key)

    return walk(ds_keys.tree(), "")


def _autos(config: dict[str, Any], hf: bool) -> Iterator[Finding]:
    for key, value in leaves(config):
        if value != "auto" or key.startswith((*_OWN_AUTO, *_COMMENT)):
            continue
        if not hf:
            fate = "drops it and takes its default" if _is_strict(key) else "stops at it"
            fate += ", which trains in fp32" if key in ("bf16.enabled", "fp16.enabled") else ""
            message = (
                f'"auto" is for Hugging Face, DeepSpeed itself {fate}; write the value, or check with '
                "--hf"
            )
            yield error(key, "auto", message)
        elif default := _PLUGIN_FILLS.get(key):
            message = (
                f"Accelerate's own settings decide (`accelerate config`, its plugin), and without them "
                f"it is {default}, also under Trainer; write the value"
            )
            yield warning(key, "hf-auto", message)
        elif key not in HF_FILLS:
            message = 'neither Trainer nor Accelerate fills in this "auto"; write the value'
            yield error(key, "auto", message)
