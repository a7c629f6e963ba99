"""A linter for DeepSpeed JSON: finds settings that DeepSpeed 0.19.8 rejects, ignores or misreads.

`lint` works on any config, ours or not. This file walks the keys; the semantic rules are in
`rules.py` and `zero_rules.py`, and the key table is in `keys.py`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from launch.ds_json import keys as ds_keys
from launch.ds_json.finding import Finding, error
from launch.ds_json.rules import RULES
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


def lint(config: Any, *, hf: bool = False, world_size: int | None = None) -> list[Finding]:
    """Lint a DeepSpeed config; errors come first.

    Args:
        config: the parsed JSON.
        hf: the config is for transformers' Trainer or Accelerate, which fill in "auto".
        world_size: number of data parallel ranks, if known, to check the batch sizes.
    """
    if not isinstance(config, dict):
        return [error("", "not-an-object", "a DeepSpeed config is a JSON object {...}")]
    findings = [
        *_walk_unknown(config, ds_keys.tree(), ""),
        *_autos(config, hf),
        *_scalars(config),
        *_blocks(config),
    ]
    facts = Facts.read(config, hf=hf, world_size=world_size)
    # Values are checked first, so that rules can assume blocks are objects and numbers are numbers.
    if facts is not None and not any(f.rule == "wrong-value" for f in findings):
        for rule in (*RULES, *STAGE_RULES):
            findings += rule(facts)
    return sorted(findings, key=lambda finding: (finding.level != "error", finding.key))


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
            yield _unknown(key, here, valid, path)
        elif isinstance(value, dict) and valid[key] is not None:
            yield from _walk_unknown(value, valid[key], here)


def _unknown(key: str, here: str, valid: ds_keys.Tree, path: str) -> Finding:
    strict = any(path == name or path.startswith(f"{name}.") for name in ds_keys.models())
    fate = "DeepSpeed rejects it" if strict else "DeepSpeed ignores it without a word"
    hint = nearest(key, valid)
    if not hint:
        homes = [parent for parent, name in _all_keys() if name == key and parent != path]
        if homes:
            home = homes[0] or "the top level"
            hint = f"; it belongs in {home}"
    return error(here, "unknown-key", f"unknown key; {fate}{hint}")


def _all_keys() -> Iterator[tuple[str, str]]:
    def walk(block: ds_keys.Tree, path: str) -> Iterator[tuple[str, str]]:
        for key, below in block.items():
            yield path, key
            if below:
                yield from walk(below, f"{path}.{key}" if path else key)

    return walk(ds_keys.tree(), "")


def _autos(config: dict[str, Any], hf: bool) -> Iterator[Finding]:
    for key, value in leaves(config):
        if value != "auto" or key.startswith(_OWN_AUTO):
            continue
        if not hf:
            message = (
                '"auto" is for Hugging Face; DeepSpeed itself drops a nested one and takes its '
                "default (bf16.enabled: fp32), and fails on others; write the value, or check "
                "with --hf"
            )
            yield error(key, "auto", message)
        elif key not in HF_FILLS:
            message = 'neither Trainer nor Accelerate fills in this "auto"; write the value'
            yield error(key, "auto", message)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda v: isinstance(v, bool),
    "text": lambda v: isinstance(v, str),
    "positive integer": lambda v: isinstance(v, int) and v > 0,
    "positive number": lambda v: isinstance(v, int | float) and v > 0,
    "number from 0": lambda v: isinstance(v, int | float) and math.isfinite(v) and v >= 0,
}


def _scalars(config: dict[str, Any]) -> Iterator[Finding]:
    for key, kind in ds_keys.SCALARS.items():
        value = config.get(key)
        if value is None or value == "auto":
            continue
        if (isinstance(value, bool) and kind != "boolean") or not _KINDS[kind](value):
            yield error(key, "wrong-value", f"{value!r} should be a {kind}")


def _blocks(config: dict[str, Any]) -> Iterator[Finding]:
    """Check values inside blocks with DeepSpeed's own pydantic models."""
    from pydantic import ValidationError

    for name in ds_keys.tree():
        if name in ds_keys.SCALARS or name == "datastates_ckpt" or name not in config:
            continue
        if name == "zero_optimization" and isinstance(config[name], bool):
            message = 'true or false is the oldest form; write {"stage": 1} or another stage'
            yield error(name, "wrong-value", message)
        elif not isinstance(config[name], dict):
            message = f"{config[name]!r} should be an object {{...}}"
            yield error(name, "wrong-value", message)
    for path, model in ds_keys.models().items():
        block: Any = config
        for part in path.split("."):
            block = block.get(part) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            continue
        try:
            with _quiet():
                model(**_without_auto(block))
        except ValidationError as problem:
            yield from _explain(path, problem)
        except (AssertionError, ValueError) as problem:
            yield error(path, "wrong-value", " ".join(str(problem).split()))


def _explain(path: str, problem: Any) -> Iterator[Finding]:
    for item in problem.errors():
        if item["type"] == "extra_forbidden":
            continue  # already reported by the walk over the keys, with the nearest name
        key = ".".join([path, *(str(part) for part in item["loc"])])
        message = item["msg"].replace("Value error, ", "").replace("Assertion failed, ", "")
        value = f", but it is {item['input']!r}" if item["loc"] else ""
        yield error(key, "wrong-value", message + value)


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value != "auto"
    }


class _quiet:
    """Silence deprecation logs of DeepSpeed's models; the rules report them as findings."""

    def __enter__(self) -> None:
        from deepspeed.utils import logger

        self._level = logger.level
        logger.setLevel("CRITICAL")

    def __exit__(self, *_: object) -> None:
        from deepspeed.utils import logger

        logger.setLevel(self._level)
